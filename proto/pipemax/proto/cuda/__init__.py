"""What processes need of CUDA to share a GPU's memory: see `runtime.py`.

Nothing here imports torch, and cupy is imported only once a runtime is opened.
"""

from pipemax.proto.cuda.runtime import CudaRuntime


def open_runtime(gpu: int) -> CudaRuntime:
    """The CUDA runtime for the GPU with this ordinal. Raises ConfigError when there is no such GPU,
    no driver or no cupy. Call it as `cuda.open_runtime`: tests put a simulated GPU in its place."""
    from pipemax.proto.cuda.cupy_runtime import CupyRuntime

    return CupyRuntime(gpu)
