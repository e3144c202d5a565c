"""The coordinator's shell between real sockets: what a wrong peer may cost."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from pipemax.coordinator.assembly import Resumed
from pipemax.coordinator.capacity import check_capacity
from pipemax.coordinator.events import Cancelled, FinishRequest, ToStages
from pipemax.coordinator.journal import Journal
from pipemax.coordinator.journal_file import journal_path
from pipemax.coordinator.journal_reader import JournalReader
from pipemax.coordinator.shell import CoordinatorShell
from pipemax.coordinator.text.processor import TextProcessor
from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.config import CudaDevice, EngineConfig
from pipemax.proto.errors import ConfigError, PipemaxError
from pipemax.proto.messages import control, ingest
from pipemax.proto.messages.registry import CONTROL, INGEST, REPORTS, Channel
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import connect_dealer, identity_of
from pipemax.proto.wire import Codec, encode
from support.messages import EXAMPLES


class RunningShell:
    """A coordinator in a thread, and a client of it."""

    def __init__(self, run_dir: Path) -> None:
        (run_dir / "config.json").write_text(json.dumps({"vocab_size": 100, "eos_token_id": 2}))
        config = EngineConfig(
            model=str(run_dir), served_model_name="m", layer_split=(1,), max_model_len=50
        )
        self.run_dir = run_dir
        self.shell = CoordinatorShell(config, run_dir, TextProcessor(run_dir))
        self.error: PipemaxError | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.client = connect_dealer(self.context, socket_endpoint(run_dir, "ingest"), INGEST)

    def _run(self) -> None:
        try:
            self.shell.run()
        except PipemaxError as error:
            self.error = error

    def say(self, identity: bytes, *messages: Message, channel: Channel = CONTROL) -> None:
        """Messages from a peer that then leaves."""
        endpoint = socket_endpoint(self.run_dir, channel.name)
        socket = connect_dealer(self.context, endpoint, channel, identity)
        for message in messages:
            socket.send(encode(message))
        socket.close(linger=2000)

    def status(self) -> ingest.Status:
        self.client.send(encode(ingest.StatusQuery()))
        assert self.client.poll(20_000), "the coordinator does not answer"
        answer = Codec(INGEST, at_binder=False).decode(self.client.recv())
        assert isinstance(answer, ingest.Status)
        return answer

    def close(self) -> None:
        self.shell.stop()
        self.thread.join()
        self.context.destroy(linger=0)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningShell]:
    shell = RunningShell(tmp_path)
    yield shell
    shell.close()


def hello(role: control.Role, protocol: int = PROTOCOL_VERSION) -> control.Hello:
    return control.Hello(protocol=protocol, role=role, pid=7, incarnation="a")


def wait_for(running: RunningShell, pid: int) -> ingest.Status:
    """The status once stage 0 is known: what was said before it has been read."""
    while (status := running.status()).stages[0].pid != pid:
        assert running.error is None
    return status


def test_a_report_of_a_daemon_that_outlived_a_coordinator_is_taken(running: RunningShell) -> None:
    totals = control.LinkTotals(load_bytes=100, load_seconds=1.0, load_copies=1)
    report = control.KvReport(
        host_blocks_total=1, host_blocks_used=0, links=(totals,), queued_load_bytes=(0,)
    )
    running.say(identity_of("kv_daemon"), hello("kv_daemon"), report)
    while running.status().load_bytes != 100:
        assert running.error is None


def test_a_stranger_on_the_control_socket_changes_nothing(running: RunningShell) -> None:
    stage = identity_of("stage", 0)
    running.say(b"stranger", hello("stage", PROTOCOL_VERSION + 1), control.Drain())
    running.say(
        stage,
        control.StepDone(epoch=0, step=0, stage=900, compute_s=0.0, state_seconds={}),
        control.Drain(),
        hello("stage"),
    )
    status = wait_for(running, pid=7)
    assert status.phase == "starting"
    assert status.stages[0].steps == 0
    running.client.send(encode(ingest.Submit(request_id="a", prompt_token_ids=(5,))))
    assert not running.client.poll(100), "a request was refused as if the system were draining"


def test_reports_are_read_while_nothing_runs(running: RunningShell) -> None:
    running.say(identity_of("stage", 0), hello("stage"))
    wait_for(running, pid=7)
    done = control.StepDone(epoch=0, step=0, stage=0, compute_s=0.0, state_seconds={"compute": 2.0})
    running.say(identity_of("stage", 0), done, channel=REPORTS)
    while running.status().stages[0].steps != 1:
        assert running.error is None
    assert running.status().stages[0].state_seconds == {"compute": 2.0}


def test_a_coordinator_that_was_started_again_learns_of_a_stage_by_its_beat(
    running: RunningShell,
) -> None:
    running.say(identity_of("stage", 0), hello("stage"), channel=REPORTS)
    wait_for(running, pid=7)


def test_what_a_stage_said_before_it_was_replaced_is_late(running: RunningShell) -> None:
    replaced = msgspec.structs.replace(hello("stage"), pid=6, incarnation="before")
    running.say(identity_of("stage", 0), hello("stage"))
    wait_for(running, pid=7)
    beat = control.Beat(state_seconds={"send": 1.0})
    running.say(identity_of("stage", 0), replaced, beat, channel=REPORTS)
    while running.status().stages[0].state_seconds != {"send": 1.0}:
        assert running.error is None
    assert running.status().stages[0].pid == 7


def test_a_stage_from_another_installation_ends_the_coordinator_with_the_reason(
    running: RunningShell,
) -> None:
    running.say(identity_of("stage", 0), hello("stage", PROTOCOL_VERSION + 1))
    running.thread.join(20)
    assert isinstance(running.error, ConfigError)
    assert "from one installation" in str(running.error)


def test_a_plan_leaves_before_results_are_turned_into_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = RunningShell(tmp_path)
    running.close()
    shell, order = running.shell, []
    plan = next(m for m in EXAMPLES if isinstance(m, control.StepPlan))
    finished = next(m for m in EXAMPLES if isinstance(m, ingest.Finished))
    result = FinishRequest(1, (5,), "length", None, 0.0, 0.0)

    def finish(result: FinishRequest, now: float) -> tuple[int, ingest.Finished]:
        order.append("result")
        return 1, finished

    commands = [result, ToStages(plan)]
    monkeypatch.setattr(shell._scheduler, "handle", lambda event, now: commands)
    monkeypatch.setattr(shell._sessions, "finish", finish)
    monkeypatch.setattr(shell._control, "to_stages", lambda message: order.append("plan"))
    shell._tell(Cancelled(1))
    assert order == ["plan", "result"]


def test_pools_too_small_for_the_longest_request_name_the_flag_that_sizes_them() -> None:
    cuda = CudaDevice(gpus=(0,), block_bytes=(2**20,), gpu_memory_utilization=0.8)
    config = EngineConfig(
        model="m",
        served_model_name="m",
        layer_split=(1,),
        max_model_len=100,  # 7 blocks and a spare one
        device="cuda",
        cuda=cuda,
        kv_cache_memory_bytes=None,
    )

    def resumed(num_blocks: int) -> Resumed:
        return Resumed(1, num_blocks, 0, [2**20], device_kept=False, host_kept=False, sweeps=[])

    check_capacity(config, resumed(8))
    with pytest.raises(ConfigError, match=r"holds 7 blocks, .* needs 8: .*") as refused:
        check_capacity(config, resumed(7))
    assert "raise --gpu-memory-utilization above 0.8 or" in str(refused.value)
    assert "lower --max-model-len to 96" in str(refused.value)
    fixed = msgspec.structs.replace(config, kv_cache_memory_bytes=7 * 2**20)
    with pytest.raises(ConfigError, match=r"raise --kv-cache-memory-bytes to 8\.0 MiB or lower"):
        check_capacity(fixed, resumed(7))


def test_a_damaged_journal_ends_the_coordinator_with_what_to_do(tmp_path: Path) -> None:
    path = journal_path("default")
    Journal(path).close(clean=True)
    path.write_bytes(b"no journal" * 100)
    running = RunningShell(tmp_path)
    running.thread.join(20)
    running.close()
    assert isinstance(running.error, ConfigError)
    assert "pipemax results JOB --journal" in str(running.error)


def test_jobs_are_kept_before_they_are_acknowledged_and_wait_for_the_system(
    tmp_path: Path,
) -> None:
    running = RunningShell(tmp_path)
    entry = ingest.JobRequest(request=ingest.Submit(request_id="a", prompt_token_ids=(5,)))
    messages = (
        ingest.OpenJob(number=1, job="night"),
        ingest.AddRequests(number=2, job="night", first_seq=0, requests=(entry,)),
        ingest.FetchResults(number=3, job="other", position=0),
    )
    answers = []
    for message in messages:
        running.client.send(encode(message))
        assert running.client.poll(20_000)
        answers.append(Codec(INGEST, at_binder=False).decode(running.client.recv()))
    assert [getattr(answer, "number", None) for answer in answers] == [1, 2, 3]
    assert isinstance(answers[2], ingest.JobRefused)
    assert running.status().requests_waiting == 0, "nothing starts before the system is complete"
    running.close()
    with JournalReader(journal_path("default")) as reader:
        (job,) = reader.jobs()
    assert (job.name, job.num_requests, job.state) == ("night", 1, "open")


def test_a_request_that_waits_longer_than_it_may_is_given_up(running: RunningShell) -> None:
    for request_id, timeout_s in (("patient", None), ("hasty", 0.05)):
        submit = ingest.Submit(request_id=request_id, prompt_token_ids=(5,), timeout_s=timeout_s)
        running.client.send(encode(submit))
    assert running.client.poll(20_000)
    answer = Codec(INGEST, at_binder=False).decode(running.client.recv())
    assert isinstance(answer, ingest.Finished)
    assert (answer.request_id, answer.error_code) == ("hasty", "timeout")
    assert running.status().requests_waiting == 1
