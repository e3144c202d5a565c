"""A stage on a simulated GPU, whose operations come late at random, against the CPU's."""

import random
import time
from pathlib import Path

import pytest

from pipemax.proto.cuda.runtime import Stream
from pipemax.stage_worker.attention.device import select
from pipemax.stage_worker.devices.cuda.torch_side import Graph, Kernels, NotCapturableError
from pipemax.stage_worker.engine import StageEngine
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue
from pipemax.stage_worker.torch_engine import TorchEngine
from support.cuda_stage import Done, FakeLinks, open_stage, ready_queue, simulated, stage_config
from support.fake_cuda.attention import RecordableBackend
from support.fake_cuda.torch_side import FakeTorch
from support.local_system import small_config
from support.model_zoo import build_model
from support.slot_driver import Request, SlotDriver

BLOCK, LENGTH = 8, 9
BANNED = tuple(range(200, 420))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("model") / "llama")


def driver(num_slots: int = 3) -> SlotDriver:
    """Two requests a slot: greedy ones, drawn ones, and such with banned tokens."""
    draw = random.Random(3)
    ids = draw.sample(range(1, 61), 60)
    slots: list[list[Request]] = []
    for slot in range(num_slots):
        slots.append([])
        for _ in range(2):
            prompt = [draw.randrange(3, 500) for _ in range(draw.randrange(1, 40))]
            request = Request(prompt, [ids.pop() for _ in range(7)], seed=draw.randrange(2**63))
            request.temperature = 0.8 if slot == 1 else 0.0
            request.banned = BANNED if slot != 0 else ()
            slots[-1].append(request)
    return SlotDriver(slots, length=LENGTH, block_size=BLOCK)


def run(engine: StageEngine, queue: StepQueue, work: SlotDriver) -> FakeLinks:
    clock = StateClock(time.monotonic_ns)

    def react(done: Done) -> None:
        work.done(done.step, done.tokens, queue.add_plan)
        links.stopping = work.finished

    links = FakeLinks(clock, react)
    work.begin(queue.add_plan)
    engine.work_loop(queue, links, clock).run()
    return links


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    config = small_config(model_dir, stages=1, block_size=BLOCK, max_model_len=128)
    engine = TorchEngine(config, 0)
    queue = StepQueue(takes_activations=False)
    queue.reset(1)
    work = driver()
    run(engine, queue, work)
    engine.close()
    return work.tokens


def test_tokens_equal_the_cpus(model_dir: Path, expected: list[list[int]], tmp_path: Path) -> None:
    """Steps of several slots in flight at once, each over one of the versions of all buffers."""
    with simulated(tmp_path / "gpu", delay_s=0.002) as process:
        with open_stage(stage_config(model_dir)) as engine:
            work = driver()
            process.blocking_calls.clear()
            run(engine, ready_queue(engine, takes_activations=False), work)
            waits = [call for call in process.blocking_calls if call.thread == "MainThread"]
        assert process.machine.held_bytes(0) == 0
        process.close()
    assert work.tokens == expected
    assert waits == []


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_graphs_give_the_same_tokens(
    model_dir: Path,
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    enforce_eager: bool,
) -> None:
    """Batches of two in a graph of two, of one in a graph of one; a few rows of padding in the
    graph of four."""
    monkeypatch.setattr(select, "ReferenceBackend", RecordableBackend)
    replayed: list[int] = []
    replay = FakeTorch.replay

    def count(side: FakeTorch, stream: Stream, graph: Graph) -> None:
        replayed.append(stream)
        replay(side, stream, graph)

    monkeypatch.setattr(FakeTorch, "replay", count)
    config = stage_config(model_dir, cuda={"enforce_eager": enforce_eager})
    with simulated(tmp_path / "gpu", delay_s=0.002) as process:
        with open_stage(config) as engine:
            work = driver()
            work.slots[1].append(work.slots[2].pop())  # three in one slot, one in another
            run(engine, ready_queue(engine, takes_activations=False), work)
        process.close()
    assert sorted(work.tokens) == sorted(expected)
    assert (len(replayed) >= 3 * (LENGTH - 1)) is not enforce_eager
    assert not (enforce_eager and replayed)


def test_what_cannot_be_recorded_runs_all_the_same(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(side: FakeTorch, stream: Stream, kernels: Kernels) -> Graph:
        raise NotCapturableError("operation not permitted when stream is capturing")

    monkeypatch.setattr(select, "ReferenceBackend", RecordableBackend)
    monkeypatch.setattr(FakeTorch, "capture", refuse)
    with simulated(tmp_path / "gpu") as process:
        with open_stage(stage_config(model_dir)) as engine:
            run(engine, ready_queue(engine, takes_activations=False), driver(1))
        process.close()
    assert "no CUDA graphs: operation not permitted when stream is capturing" in caplog.text
