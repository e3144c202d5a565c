"""CUDA itself does what PipeMax takes it to do, in one process and between processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cuda_semantics import CHECKS, Check, name_of
from support.cuda_world import CudaWorld, open_real
from support.fake_cuda import FakeCudaProcess, FakeMachine


@pytest.fixture
def world(rehearsal: bool, tmp_path: Path) -> Iterator[CudaWorld]:
    if not rehearsal:
        yield CudaWorld(open_real("0"), "support.cuda_world:open_real", "0")
        return
    machine = FakeMachine(gpu_bytes=128 * 2**20).at(tmp_path)
    process = FakeCudaProcess(machine)
    opener = "support.fake_cuda.opening:open_first_gpu"
    yield CudaWorld(process.open_runtime(0), opener, machine.directory)
    process.close()


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_cuda(world: CudaWorld, check: Check) -> None:
    check(world)
