"""Start, recovery and restarts during either, without any process."""

import pytest

from pipemax.coordinator.assembly import (
    DAEMON,
    Action,
    Assembly,
    ResetAll,
    sampler_name,
    stage_name,
)
from pipemax.coordinator.events import Paused, Resumed
from pipemax.proto.messages.control import (
    Hello,
    KvReady,
    Role,
    SamplerReady,
    StageReady,
    SweepSample,
)

SWEEP = (SweepSample(1, 64, 0, 0, 0.01), SweepSample(8, 512, 0, 0, 0.02))


def hello(name: str, incarnation: str) -> Hello:
    role: Role = "kv_daemon" if name == DAEMON else "stage"
    if name.startswith("sampler"):
        role = "sampler"
    index = 0 if name == DAEMON else int(name.rpartition("-")[2])
    return Hello(protocol=1, role=role, index=index, pid=1, incarnation=incarnation)


def ready(name: str, num_blocks: int = 100) -> StageReady | SamplerReady | KvReady:
    if name == DAEMON:
        return KvReady(pool_bytes=1)
    if name.startswith("sampler"):
        return SamplerReady(sampler=int(name.removeprefix("sampler-")))
    return StageReady(
        stage=int(name.removeprefix("stage-")),
        layers=(0, 1),
        num_blocks=num_blocks,
        block_bytes=64,
        weights_bytes=1,
        load_s=0.0,
        activation_transport="shm",
        sweep=SWEEP,
    )


def start(
    assembly: Assembly, name: str, incarnation: str = "1", num_blocks: int = 100
) -> list[Action]:
    return [
        *assembly.hello(name, hello(name, incarnation)),
        *assembly.ready(name, ready(name, num_blocks)),
    ]


def answer_reset(assembly: Assembly, names: list[str]) -> list[Action]:
    actions: list[Action] = []
    for name in names:
        actions += assembly.reset_done(name, assembly.epoch, 50 if name == DAEMON else 0)
    return actions


@pytest.fixture
def running() -> tuple[Assembly, list[str]]:
    assembly = Assembly(2, num_samplers=1)
    names = [stage_name(0), stage_name(1), sampler_name(0), DAEMON]
    for name in names:
        start(assembly, name)
    answer_reset(assembly, names)
    assert assembly.running
    return assembly, names


def test_resets_once_all_are_ready_and_resumes_once_all_have_answered() -> None:
    assembly = Assembly(2)
    assert start(assembly, "stage-1", num_blocks=30) == []
    assert start(assembly, DAEMON) == []
    assert assembly.missing[0] == "stage-0 (not started)"
    (reset,) = start(assembly, "stage-0", num_blocks=20)
    assert isinstance(reset, ResetAll)
    assert reset.message.epoch == 1
    assert not reset.message.keep_host_blocks
    assert answer_reset(assembly, ["stage-0", DAEMON]) == []
    (resumed,) = answer_reset(assembly, ["stage-1"])
    assert isinstance(resumed, Resumed)
    assert resumed.num_device_blocks == 20, "capacity is the smallest over stages"
    assert resumed.num_host_blocks == 50
    assert resumed.sweeps == [SWEEP, SWEEP]
    assert not resumed.device_kept
    assert not resumed.host_kept
    assert assembly.missing == ()


def test_repeated_hello_changes_nothing(running: tuple[Assembly, list[str]]) -> None:
    assembly, _ = running
    assert assembly.hello("stage-0", hello("stage-0", "1")) == []
    assert assembly.running


@pytest.mark.parametrize(
    ("lost", "device_kept", "host_kept"),
    [("stage-1", False, True), (DAEMON, True, False), ("sampler-0", True, True)],
)
def test_a_restarted_process_pauses_and_says_what_survived(
    running: tuple[Assembly, list[str]], lost: str, device_kept: bool, host_kept: bool
) -> None:
    assembly, names = running
    assert assembly.hello(lost, hello(lost, "2")) == [Paused()]
    (reset,) = assembly.ready(lost, ready(lost))
    assert isinstance(reset, ResetAll)
    assert reset.message.epoch == 2
    assert reset.message.keep_host_blocks == host_kept
    (resumed,) = answer_reset(assembly, names)
    assert isinstance(resumed, Resumed)
    assert resumed.device_kept == device_kept
    assert resumed.host_kept == host_kept


def test_a_second_loss_during_recovery_voids_the_first_reset(
    running: tuple[Assembly, list[str]],
) -> None:
    assembly, names = running
    start(assembly, "stage-0", "2")
    answer_reset(assembly, ["stage-0", "stage-1", "sampler-0"])
    (reset,) = start(assembly, DAEMON, "2")
    assert isinstance(reset, ResetAll)
    assert reset.message.epoch == 3
    assert assembly.reset_done(DAEMON, 2, 50) == [], "an answer to the older Reset"
    (resumed,) = answer_reset(assembly, names)
    assert isinstance(resumed, Resumed)
    assert not resumed.device_kept
    assert not resumed.host_kept


def test_an_answer_of_the_predecessor_is_not_taken_for_its_successors(
    running: tuple[Assembly, list[str]],
) -> None:
    """The new process has said Hello and still loads."""
    assembly, names = running
    assembly.hello("stage-0", hello("stage-0", "2"))
    assert assembly.reset_done("stage-0", assembly.epoch, 0) == []
    assert not assembly.running
    assembly.ready("stage-0", ready("stage-0"))
    (resumed,) = answer_reset(assembly, names)
    assert isinstance(resumed, Resumed)
