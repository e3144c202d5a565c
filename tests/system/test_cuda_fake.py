"""The whole system on simulated GPUs, whose operations come late at random: what waits for no event
gives wrong tokens. Attention is plain torch; the rest is what runs on a real GPU."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import Client
from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.ingest import Status
from support.background import Background
from support.command import eventually
from support.fake_cuda import FakeMachine
from support.fake_cuda.bodies import blocking_calls
from support.local_system import LocalSystem, cuda_config, greedy, tokens_of
from support.model_zoo import build_model, reference_tokens

STATES = {"compute", "wait_plan", "wait_activation", "wait_kv", "prepare", "send"}
BLOCK = 8


@dataclass(frozen=True)
class Work:
    model_dir: Path
    prompts: list[list[int]]
    counts: list[int]
    expected: list[list[int]]

    @property
    def blocks(self) -> int:
        """All contexts at their longest."""
        lengths = [len(p) + n for p, n in zip(self.prompts, self.counts, strict=True)]
        return sum(-(-length // BLOCK) for length in lengths)


@dataclass(frozen=True)
class Way:
    """How stages work together."""

    gpus: tuple[int, ...] = (0, 0)
    copies: str = "stage"
    transport: str = "ipc"
    enforce_eager: bool = False

    def __str__(self) -> str:
        eager = "-eager" if self.enforce_eager else ""
        return f"{len(self.gpus)}-{self.copies}-{self.transport}{eager}"

    def config(self, work: Work, **settings: Any) -> EngineConfig:
        """With a device pool of a third of the working set."""
        return cuda_config(
            work.model_dir,
            gpus=self.gpus,
            cuda={"kv_copies": self.copies, "enforce_eager": self.enforce_eager},
            activation_transport=self.transport,
            block_size=BLOCK,
            device_blocks=work.blocks // 3,
            host_blocks=2 * work.blocks,
            max_model_len=256,
            max_num_batched_tokens=128,
            max_num_seqs=16,
            **settings,
        )


def machine(**knobs: Any) -> FakeMachine:
    return FakeMachine(num_gpus=2, delay_s=0.001, **knobs)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    model_dir = build_model("llama", tmp_path_factory.mktemp("llama"))
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 512) for _ in range(draw.randrange(1, 120))] for _ in range(14)]
    counts = [draw.randrange(8, 48) for _ in prompts]
    return Work(model_dir, prompts, counts, reference_tokens(model_dir, prompts, counts))


def _matrix() -> Iterator[Any]:
    """Every setting, and every pair of settings, is in the daily part."""
    daily = {
        Way((0, 0), "stage", "ipc"),
        Way((0, 0), "daemon", "shm"),
        Way((0, 0, 0), "stage", "shm", enforce_eager=True),
        Way((0, 0, 0), "daemon", "ipc", enforce_eager=True),
    }
    for gpus, copies, transport, eager in itertools.product(
        ((0, 0), (0, 0, 0)), ("stage", "daemon"), ("ipc", "shm"), (False, True)
    ):
        way = Way(gpus, copies, transport, eager)
        marks = () if way in daily else (pytest.mark.full,)
        yield pytest.param(way, id=str(way), marks=marks)


def generate(client: Client, work: Work) -> list[list[int]]:
    return tokens_of(client.generate(work.prompts, [greedy(n) for n in work.counts]))


def wait_for(client: Client, condition: Callable[[Status], bool]) -> Status:
    deadline = time.monotonic() + 60
    while not condition(status := client.status()):
        assert time.monotonic() < deadline, status
        time.sleep(0.01)
    return status


def has_produced(tokens: float, status: Status) -> bool:
    return status.generation_tokens >= tokens


@pytest.mark.parametrize("way", list(_matrix()))
def test_tokens_equal_transformers(work: Work, way: Way) -> None:
    """And nobody's work loop waited for a GPU: not after the first tokens, until the last."""
    with LocalSystem(way.config(work), machine()) as system, system.client() as client:
        system.wait_ready(client)
        watched = Background(lambda: (wait_for(client, partial(has_produced, 5)), time.monotonic()))
        with system.client() as user:
            tokens = generate(user, work)
        end_s = time.monotonic()
        begin_s = watched.outcome()[1]  # type: ignore[index]
        status = client.status()
    assert tokens == work.expected
    assert ("CUDA graphs for" in system.log("stage-0")) != way.enforce_eager
    assert status.epoch == 1
    assert status.load_bytes > 0
    assert status.decode_prefetched_tokens > 0
    assert {stage.activation_transport for stage in status.stages} == {way.transport}
    names = ["kv-daemon", *(f"stage-{i}" for i in range(len(way.gpus)))]
    waits = [
        (name, call)
        for name in names
        for call in blocking_calls(system.run_dir, name)
        if call.thread == "MainThread" and begin_s < call.at_s < end_s
    ]
    assert waits == []
    assert system.machine is not None
    assert system.machine.held_bytes(0) == 0


@pytest.mark.parametrize(("peers", "transport"), [((), "shm"), (((0, 1),), "ipc")])
def test_two_gpus_share_memory_if_they_can(
    work: Work, peers: tuple[tuple[int, int], ...], transport: str
) -> None:
    config = Way((0, 1), "stage", "auto").config(work)
    with LocalSystem(config, machine(peers=peers)) as system, system.client() as client:
        assert generate(client, work) == work.expected
        status = client.status()
    assert {stage.activation_transport for stage in status.stages} == {transport}


@pytest.mark.parametrize(
    ("way", "victims"),
    [
        (Way((0, 0), "stage", "ipc"), ["stage-0"]),
        (Way((0, 0), "daemon", "ipc"), ["stage-1"]),
        (Way((0, 0), "stage", "shm"), ["kv-daemon"]),
        (Way((0, 0), "daemon", "shm"), ["kv-daemon"]),
        *(
            pytest.param(Way((0, 0), copies, transport), victims, marks=pytest.mark.full)
            for copies in ("stage", "daemon")
            for transport in ("ipc", "shm")
            for victims in (["stage-0"], ["stage-1"], ["stage-1", "kv-daemon"])
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Way) else "+".join(value),
)
def test_killed_in_mid_batch(work: Work, way: Way, victims: list[str]) -> None:
    """The batch ends with the same tokens, and of the dead no GPU memory is left."""
    with (
        LocalSystem(way.config(work), machine()) as system,
        system.client() as client,
        system.client() as watcher,
    ):
        system.wait_ready(watcher)
        assert system.machine is not None
        held = system.machine.held_bytes(0)
        batch = Background(lambda: generate(client, work))
        wait_for(watcher, partial(has_produced, 0.3 * sum(work.counts)))
        for name in victims:
            system.kill(name)
        for name in victims:
            system.start(name)
        while batch.is_alive():  # who waits for what a dead process was to record dies as well
            system.revive()
            time.sleep(0.05)
        assert batch.outcome() == work.expected
        assert watcher.status().epoch >= 2
        assert system.machine.held_bytes(0) == held
    assert system.machine.held_bytes(0) == 0


def test_states_sum_to_wall_time(work: Work) -> None:
    config = Way().config(work)
    with (
        LocalSystem(config, machine()) as system,
        system.client() as client,
        system.client() as watcher,
    ):
        system.wait_ready(watcher)
        batch = Background(lambda: [generate(client, work) for _ in range(3)])
        first = wait_for(watcher, partial(has_produced, 20))
        assert eventually(lambda: watcher.status().uptime_s - first.uptime_s > 2.0, 30)
        last = watcher.status()
        batch.outcome()
    wall_s = last.uptime_s - first.uptime_s
    for before, after in zip(first.stages, last.stages, strict=True):
        assert set(after.state_seconds) == STATES
        spent_s = sum(after.state_seconds.values()) - sum(before.state_seconds.values())
        assert spent_s == pytest.approx(wall_s, rel=0.02)
        assert after.state_seconds["compute"] > before.state_seconds["compute"]
