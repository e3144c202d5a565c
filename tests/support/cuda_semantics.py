"""What PipeMax takes CUDA to do, as checks of any CudaRuntime.

The real one must pass the same as the simulated one, or tests with the simulated one prove nothing.

Each check takes a CudaWorld; `CHECKS` lists them. Host memory is memfd memory throughout, as it is
in the product.
"""

from collections.abc import Callable

from support import cuda_checks_alone, cuda_checks_shared
from support.cuda_world import CudaWorld

Check = Callable[[CudaWorld], None]
CHECKS: tuple[Check, ...] = tuple(
    value
    for module in (cuda_checks_alone, cuda_checks_shared)
    for name, value in vars(module).items()
    if name.startswith("check_")
)


def name_of(check: Check) -> str:
    """For pytest's ids."""
    return check.__name__.removeprefix("check_")
