"""What a stage on a simulated GPU does while the GPU is busy, late, or told to forget."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pipemax.proto.cuda.runtime import Stream
from pipemax.proto.errors import PipemaxSystemError
from pipemax.proto.messages.kv import PoolAttached
from pipemax.stage_worker.devices.cuda.buffers import DeviceBuffer
from pipemax.stage_worker.devices.cuda.engine import CudaEngine
from pipemax.stage_worker.devices.cuda.inlet import ArrivedRows
from pipemax.stage_worker.devices.cuda.work_loop import MAX_IN_FLIGHT
from pipemax.stage_worker.state_clock import StateClock
from support.cuda_stage import Done, FakeLinks, open_stage, ready_queue, simulated, stage_config
from support.fake_cuda import FakeCudaProcess
from support.model_zoo import build_model
from support.slot_driver import Request, SlotDriver
from support.step_plans import decode_plan

BLOCK, LENGTH, HELD_S = 8, 4, 0.05


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[FakeCudaProcess]:
    with simulated(tmp_path / "gpu") as process:
        yield process
        process.close()


@dataclass
class Gate:
    """Holds up streams until it is opened."""

    engine: CudaEngine
    opened: threading.Event = field(default_factory=threading.Event)

    def hold(self, stream: Stream) -> None:
        self.engine._runtime.call(stream, self.pass_through)  # type: ignore[attr-defined]

    def wait(self, stream: Stream, number: int) -> None:
        """As PeerEvents do."""
        self.hold(stream)

    def pass_through(self) -> None:
        assert self.opened.wait(30.0)


def slots(count: int) -> SlotDriver:
    requests = [[Request([3 + i, 7, 40 + i], [2 * i + 1, 2 * i + 2])] for i in range(count)]
    return SlotDriver(requests, length=LENGTH, block_size=BLOCK)


class Stage:
    """Runs the loop with a script that is played between messages."""

    def __init__(self, engine: CudaEngine, *, takes_activations: bool = False) -> None:
        self.engine = engine
        self.queue = ready_queue(engine, takes_activations=takes_activations)
        self.clock = StateClock(time.monotonic_ns)
        self.started_s = time.monotonic()
        self.links = FakeLinks(self.clock)
        self.links.during_pump = self._play
        self.script: list[tuple[Callable[[], bool], Callable[[], object]]] = []

    def when(self, condition: Callable[[], bool], action: Callable[[], object]) -> None:
        self.script.append((condition, action))

    def _play(self) -> None:
        if self.script and self.script[0][0]():
            self.script.pop(0)[1]()

    def stop(self) -> None:
        self.links.stopping = True

    def run(self) -> None:
        self.engine.work_loop(self.queue, self.links, self.clock).run()
        assert not self.script

    def drive(self, work: SlotDriver) -> None:
        """Plans again what is done; stops when all is."""

        def react(done: Done) -> None:
            work.done(done.step, done.tokens, self.queue.add_plan)
            self.links.stopping = work.finished

        self.links.react = react
        work.begin(self.queue.add_plan)


def tokens_alone(model_dir: Path, directory: Path, count: int) -> list[list[int]]:
    """With one step in flight at a time."""
    found = []
    with simulated(directory) as process:
        with open_stage(stage_config(model_dir)) as engine:
            for request in slots(count).slots:
                stage = Stage(engine)
                work = SlotDriver([request], length=LENGTH, block_size=BLOCK)
                stage.drive(work)
                stage.run()
                found += work.tokens
        process.close()
    return found


def test_four_steps_are_in_flight_and_their_inputs_stay(
    model_dir: Path, process: FakeCudaProcess, tmp_path: Path
) -> None:
    """More steps than versions of the inputs, all planned before the GPU begins the first."""
    expected = tokens_alone(model_dir, tmp_path / "other", 8)
    with open_stage(stage_config(model_dir)) as engine:
        stage, gate, work = Stage(engine), Gate(engine), slots(8)
        gate.hold(engine._compute)
        stage.drive(work)
        idle = iter(range(40))
        stage.when(lambda: len(stage.links.computed_steps) == MAX_IN_FLIGHT, lambda: None)
        stage.when(lambda: next(idle, None) is None, gate.opened.set)
        launched: list[int] = []
        stage.script.insert(
            1, (lambda: True, lambda: launched.append(len(stage.links.computed_steps)))
        )
        stage.run()
    assert launched == [MAX_IN_FLIGHT], "the fifth waits until the first has ended"
    assert work.tokens == expected
    assert [step for step, _ in stage.links.computed_steps] == [d.step for d in stage.links.done]
    events = [event for _, event in stage.links.computed_steps]
    assert events == list(range(len(events)))


def test_a_step_is_announced_when_queued_and_done_when_over(
    model_dir: Path, process: FakeCudaProcess
) -> None:
    with open_stage(stage_config(model_dir)) as engine:
        stage, gate = Stage(engine), Gate(engine)
        gate.hold(engine._compute)
        stage.queue.add_plan(decode_plan(0))
        stage.when(lambda: stage.links.log == ["computed 0"], gate.opened.set)
        stage.when(lambda: len(stage.links.done) == 1, stage.stop)
        stage.run()
    assert stage.links.log == ["computed 0", "done 0"]


def test_a_reset_voids_what_waits_and_lets_what_flies_land_silently(
    model_dir: Path, process: FakeCudaProcess, tmp_path: Path
) -> None:
    expected = tokens_alone(model_dir, tmp_path / "other", 2)
    attached = []
    with open_stage(stage_config(model_dir)) as engine:
        stage, gate, work = Stage(engine), Gate(engine), slots(2)
        work.epoch = 2
        gate.hold(engine._compute)
        for step in range(7):
            stage.queue.add_plan(decode_plan(step))

        def reset() -> None:
            stage.queue.reset(2)
            engine.kv.detach()
            engine.kv.attach(PoolAttached(epoch=2))
            attached.append(engine.kv.attached)
            gate.opened.set()

        stage.when(lambda: len(stage.links.computed_steps) == MAX_IN_FLIGHT, reset)
        stage.when(lambda: engine.kv.attached, lambda: stage.drive(work))
        stage.run()
        seconds = stage.clock.seconds()
        wall_s = time.monotonic() - stage.started_s
    assert attached == [False], "memory that void steps use is not given to others"
    assert work.tokens == expected
    assert len(stage.links.computed_steps) == MAX_IN_FLIGHT + len(stage.links.done)
    assert sum(seconds.values()) == pytest.approx(wall_s, abs=0.02)


@pytest.mark.parametrize("late", ["rows", "kv", "kernels"])
def test_where_the_gpus_time_goes(model_dir: Path, process: FakeCudaProcess, late: str) -> None:
    """Whatever the GPU waits for is held up for a while; the host waits for nothing."""
    config = stage_config(model_dir, gpus=(0, 0), activation_transport="ipc")
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(open_stage(config, 1))
        stage, gate = Stage(engine, takes_activations=True), Gate(engine)
        shape = engine.ring_shape
        rows = DeviceBuffer(engine._gpu, shape.max_rows * shape.row_bytes)
        stack.callback(rows.close)
        rows.bytes.zero_()
        if late == "kv":
            hold_kv = mock.patch.object(engine.kv, "wait_loaded", gate.wait)
            stack.enter_context(hold_kv)
        elif late == "kernels":
            forward = engine._model.forward

            def slow(step: Any, hidden: torch.Tensor | None) -> torch.Tensor:
                gate.pass_through()
                return forward(step, hidden)

            stack.enter_context(mock.patch.object(engine._model, "forward", slow))
        written: Any = gate if late == "rows" else None
        stage.queue.add_plan(decode_plan(0, wait_for_load=True))
        stage.queue.add_loaded(1, 0)
        arrived = ArrivedRows((1, shape.hidden_size), rows.pointer, written, 0)
        stage.queue.add_rows(1, 0, arrived)

        def hold() -> None:
            time.sleep(HELD_S)
            gate.opened.set()

        stage.when(lambda: stage.links.log == ["computed 0"], hold)
        stage.when(lambda: bool(stage.links.done), stage.stop)
        stage.run()
    seconds = stage.links.seconds[0]
    state = {"rows": "wait_activation", "kv": "wait_kv", "kernels": "compute"}[late]
    assert seconds[state] >= HELD_S / 2
    assert late != "kernels" or stage.links.done[0].compute_s >= HELD_S / 2


def test_a_gpu_that_fails_ends_the_loop(model_dir: Path, process: FakeCudaProcess) -> None:
    """Though only the thread that waits for the GPU is told."""
    lost = PipemaxSystemError("GPU 0: synchronize event: an illegal memory access")
    with open_stage(stage_config(model_dir)) as engine:
        stage = Stage(engine)
        stage.queue.add_plan(decode_plan(0))
        with (
            mock.patch.object(engine._runtime, "synchronize_event", side_effect=lost),
            pytest.raises(PipemaxSystemError, match="an illegal memory access"),
        ):
            stage.run()
    assert stage.links.done == []
