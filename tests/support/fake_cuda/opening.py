"""Opens a simulated GPU in a child process that knows the machine's directory."""

from pathlib import Path

from support.fake_cuda.machine import FakeMachine
from support.fake_cuda.process import FakeCudaProcess
from support.fake_cuda.runtime import FakeCuda


def open_first_gpu(directory: str) -> FakeCuda:
    return FakeCudaProcess(FakeMachine.load(Path(directory))).open_runtime(0)
