"""A simulated CUDA for tests: device memory is shared memory, streams are threads.

It keeps CUDA's promises and none of its favours: what CUDA leaves undefined, or gets away with,
raises here. Several processes see the same GPUs through a FakeMachine; each has a FakeCudaProcess,
which gives a CudaRuntime for each GPU.
"""

from support.fake_cuda.machine import FakeMachine
from support.fake_cuda.process import FakeCudaProcess
from support.fake_cuda.runtime import FakeCuda

__all__ = ["FakeCuda", "FakeCudaProcess", "FakeMachine"]
