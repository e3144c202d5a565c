"""What the launcher's child says of the GPUs that are there."""

from pathlib import Path

import msgspec
import pytest

from pipemax.proto import cuda
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.stage_worker.devices.cuda.list_gpus import GpuList, list_gpus, numa_node
from support.fake_cuda import FakeCuda, FakeCudaProcess, FakeMachine


def test_every_gpu_with_its_memory_and_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeMachine(str(tmp_path), num_gpus=3, gpu_bytes=2**20, peers=((0, 2),))
    other = FakeCudaProcess(machine)
    held = other.open_runtime(1)
    pointer = held.allocate(2**16)
    monkeypatch.setattr(cuda, "open_runtime", FakeCudaProcess(machine).open_runtime)
    found = list_gpus()
    held.free(pointer)
    assert found.error is None
    assert [gpu.ordinal for gpu in found.gpus] == [0, 1, 2]
    assert [gpu.free_bytes for gpu in found.gpus] == [2**20, 2**20 - 2**16, 2**20]
    assert {gpu.total_bytes for gpu in found.gpus} == {2**20}
    assert [gpu.peers for gpu in found.gpus] == [(2,), (), (0,)]
    assert len({gpu.pci_bus_id for gpu in found.gpus}) == 3
    assert msgspec.json.decode(msgspec.json.encode(found), type=GpuList) == found


def test_no_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gpu: int) -> FakeCuda:
        raise ConfigError("no\ndriver")

    monkeypatch.setattr(cuda, "open_runtime", refuse)
    assert list_gpus() == GpuList(error="no driver")


def test_a_gpu_that_fails_is_listed_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = FakeCudaProcess(FakeMachine(str(tmp_path), num_gpus=3))

    def fail() -> tuple[int, int]:
        raise PipemaxSystemError("GPU 1: cudaErrorECCUncorrectable")

    def open_runtime(gpu: int) -> FakeCuda:
        runtime = process.open_runtime(gpu)
        if gpu == 1:
            monkeypatch.setattr(runtime, "memory", fail)
        return runtime

    monkeypatch.setattr(cuda, "open_runtime", open_runtime)
    found = list_gpus()
    assert found.error is None
    errors = [gpu.error for gpu in found.gpus]
    assert errors == [None, "GPU 1: cudaErrorECCUncorrectable", None]
    assert [gpu.ordinal for gpu in found.gpus] == [0, 1, 2]


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("0", 0), ("-1\n", None), (None, None)])
def test_memory_node_of_a_pci_device(tmp_path: Path, text: str | None, node: int | None) -> None:
    if text is not None:
        (tmp_path / "0000:65:00.0").mkdir()
        (tmp_path / "0000:65:00.0" / "numa_node").write_text(text)
    assert numa_node("0000:65:00.0", tmp_path) == node
