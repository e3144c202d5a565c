"""The simulated CUDA does what PipeMax takes the real one to do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cuda_semantics import CHECKS, Check, name_of
from support.cuda_world import CudaWorld
from support.fake_cuda import FakeCudaProcess, FakeMachine


@pytest.fixture
def world(tmp_path: Path) -> Iterator[CudaWorld]:
    machine = FakeMachine(gpu_bytes=128 * 2**20, delay_s=0.002).at(tmp_path)
    process = FakeCudaProcess(machine)
    yield CudaWorld(
        process.open_runtime(0), "support.fake_cuda.opening:open_first_gpu", machine.directory
    )
    process.close()


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_simulated(world: CudaWorld, check: Check) -> None:
    check(world)
