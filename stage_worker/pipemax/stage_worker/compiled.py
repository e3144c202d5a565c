"""Functions that numba compiles: cached on disk, and by one process at a time.

numba's cache notices a change of the file that a function stands in, and of no other: what is
compiled is named after the contents of all other files whose intrinsics and compiled functions it
uses, and of those that these use. The cache is the `__pycache__` next to the file, or the user's
own cache folder: never a shared one.
"""

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(*sources: ModuleType, **options: Any) -> Callable[[_Function], _Function]:
    """`njit`, cached on disk where a private folder can be written. `sources`: whose intrinsics and
    compiled functions a function uses."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(Path(str(source.__file__)).read_bytes())

    def compile_lazily(function: _Function) -> _Function:
        if sources:
            function.__qualname__ += f"-{digest.hexdigest()[:12]}"
        try:
            found = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no such folder: compile at every start
            found = njit(nogil=True, **options)(function)
        return cast(_Function, found)

    return compile_lazily


def cache_folder(function: Callable[..., Any]) -> Path | None:
    """Where a compiled function is kept on disk; None when no private folder can be written."""
    path = getattr(getattr(function, "stats", None), "cache_path", None)
    return Path(path) if path else None


@contextmanager
def one_compiler_at_a_time(function: Callable[..., Any]) -> Iterator[None]:
    """Stages start together: one compiles `function` and its neighbours, the others then find its
    work in the cache. numba does not lock its cache, and two processes that add different types to
    it at once can damage it."""
    folder = cache_folder(function)
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pipemax-kernels.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, however the process ends
        yield
