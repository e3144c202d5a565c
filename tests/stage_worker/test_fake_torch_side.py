"""torch on a simulated GPU: kernels run when their stream gets there, on its thread."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipemax.proto.cuda.runtime import Stream
from pipemax.proto.errors import PipemaxSystemError
from support.attention_cases import CASES, Case, check, prepare, run
from support.fake_cuda import FakeCuda, FakeCudaProcess, FakeMachine
from support.fake_cuda.attention import RecordableBackend
from support.fake_cuda.torch_side import FakeTorch


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[FakeCuda]:
    process = FakeCudaProcess(FakeMachine().at(tmp_path / "gpus"))
    yield process.open_runtime(0)
    process.die()


@pytest.fixture
def stream(gpu: FakeCuda) -> Stream:
    return gpu.create_stream()


def nothing(value: object) -> None:
    """Kernels return nothing."""


def test_kernels_run_when_the_stream_gets_there(gpu: FakeCuda, stream: Stream) -> None:
    side, open_gate = FakeTorch(gpu), threading.Event()
    values = torch.zeros(4)
    gpu.call(stream, lambda: nothing(open_gate.wait()))
    side.launch(stream, lambda: nothing(values.add_(1).mul_(3)))
    assert values.sum() == 0
    open_gate.set()
    with side.scope(stream):
        assert values.sum() == 12


def test_they_run_in_the_callers_mode(gpu: FakeCuda, stream: Stream) -> None:
    side, seen = FakeTorch(gpu), list[bool]()
    with torch.inference_mode():
        side.launch(stream, lambda: seen.append(torch.is_inference_mode_enabled()))
    with torch.no_grad():
        side.launch(stream, lambda: seen.append(torch.is_grad_enabled()))
    side.launch(stream, lambda: seen.append(torch.is_inference_mode_enabled()))
    gpu.synchronize(stream)
    assert seen == [True, False, False]


def test_a_graph_runs_over_the_same_addresses(gpu: FakeCuda, stream: Stream) -> None:
    side = FakeTorch(gpu)
    given, result = torch.zeros(3), torch.zeros(3)
    graph = side.capture(stream, lambda: nothing(result.copy_(given * 2)))
    gpu.synchronize(stream)
    assert result.sum() == 0  # recorded, not run
    for value in (1.0, 5.0):
        given.fill_(value)
        side.replay(stream, graph)
        gpu.synchronize(stream)
        assert result.tolist() == [2 * value] * 3


def test_what_makes_the_host_wait(gpu: FakeCuda, stream: Stream) -> None:
    side, values = FakeTorch(gpu), torch.arange(4)
    assert side.host_waits(stream, lambda: nothing(values.add_(1))) is None
    for kernels in (
        lambda: nothing(values.sum().item()),
        lambda: nothing(values[values > 2]),
        lambda: nothing("positive" if values[3] > 0 else "not"),
    ):
        assert side.host_waits(stream, kernels) is not None


@pytest.mark.parametrize("case", CASES[::9], ids=str)
def test_attention_that_may_be_recorded(gpu: FakeCuda, stream: Stream, case: Case) -> None:
    """It is right, and waits for nothing."""
    side, cpu = FakeTorch(gpu), torch.device("cpu")
    assert check(RecordableBackend(), case, cpu) < 0.1
    prepared = prepare(case, cpu)
    assert side.host_waits(stream, lambda: nothing(run(RecordableBackend(), prepared))) is None


def test_a_view_is_the_memory(gpu: FakeCuda) -> None:
    device = gpu.allocate(4096)
    view = FakeTorch(gpu).view(gpu.array(device, 4096))
    assert view.data_ptr() == device
    assert view.dtype == torch.uint8
    assert FakeTorch(gpu).device == view.device
    view.zero_()
    assert not gpu.array(device, 4096).any()


def test_a_failed_kernel_is_found_out(gpu: FakeCuda, stream: Stream) -> None:
    FakeTorch(gpu).launch(stream, lambda: nothing(torch.zeros(2).add_(torch.zeros(3))))
    with pytest.raises(PipemaxSystemError, match="must match"):
        gpu.synchronize(stream)
