"""How CupyRuntime uses cupy, with a stand-in for it: what CUDA does is checked on a GPU only."""

import inspect
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipemax.proto.cuda import cupy_runtime
from pipemax.proto.cuda.cupy_runtime import CupyRuntime
from pipemax.proto.cuda.runtime import CudaEvent, CudaRuntime, Stream
from pipemax.proto.errors import ConfigError, PipemaxSystemError

NOT_READY, OUT_OF_MEMORY, LAUNCH_FAILURE = 600, 2, 719
NAMES = {
    NOT_READY: "cudaErrorNotReady",
    OUT_OF_MEMORY: "cudaErrorMemoryAllocation",
    LAUNCH_FAILURE: "cudaErrorLaunchFailure",
}


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{NAMES[status]}: said by the stand-in")


class StandIn:
    """cupy.cuda.runtime: notes every call; `statuses` by name of the call."""

    CUDARuntimeError = CUDARuntimeError
    streamNonBlocking, memcpyDefault = 1, 4  # noqa: N815
    eventBlockingSync, eventDisableTiming, eventInterprocess = 1, 2, 4  # noqa: N815

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.statuses: dict[str, int] = {}

    def last(self) -> tuple[Any, ...]:
        return self.calls[-1]

    def getDeviceCount(self) -> int:  # noqa: N802
        return 2

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 3 * 2**20, 2**30

    def eventQuery(self, event: int) -> int:  # noqa: N802
        return self.statuses.get("eventQuery", 0)

    def check_status(self, status: int) -> None:
        self.calls.append(("check_status", status))
        if status:
            raise CUDARuntimeError(status)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            if status := self.statuses.get(name, 0):
                raise CUDARuntimeError(status)
            return 77

        return call


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    module = ModuleType("cupy")
    module.cuda = SimpleNamespace(runtime=stand_in)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    return stand_in


def test_every_call_makes_its_gpu_current_first(cuda: StandIn) -> None:
    runtime: CudaRuntime = CupyRuntime(1)
    runtime.record(CudaEvent(5), Stream(6))
    runtime.copy(1, 2, 3, Stream(6))
    assert cuda.calls == [
        ("setDevice", 1),
        ("eventRecord", 5, 6),
        ("setDevice", 1),
        ("memcpyAsync", 1, 2, 3, 4, 6),
    ]


def test_there_is_no_such_gpu(cuda: StandIn) -> None:
    with pytest.raises(ConfigError, match="no GPU 2; this machine shows 2"):
        CupyRuntime(2)


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ConfigError, match=r"needs cupy .*pipemax\[cuda13\]"):
        CupyRuntime(0)


def test_an_error_names_gpu_call_and_cause(cuda: StandIn) -> None:
    cuda.statuses["streamWaitEvent"] = LAUNCH_FAILURE
    with pytest.raises(PipemaxSystemError, match="GPU 1: wait for event: cudaErrorLaunchFailure"):
        CupyRuntime(1).wait(Stream(1), CudaEvent(2))


def test_a_pending_event_is_no_error_and_leaves_none(cuda: StandIn) -> None:
    """`check_status` is what clears CUDA's last error."""
    runtime = CupyRuntime(0)
    cuda.statuses["eventQuery"] = NOT_READY
    assert not runtime.finished(CudaEvent(5))
    assert cuda.last() == ("check_status", NOT_READY)
    cuda.statuses.clear()
    assert runtime.finished(CudaEvent(5))


def test_a_failed_gpu_is_not_taken_for_a_busy_one(cuda: StandIn) -> None:
    cuda.statuses["eventQuery"] = LAUNCH_FAILURE
    with pytest.raises(PipemaxSystemError, match="query event: cudaErrorLaunchFailure"):
        CupyRuntime(0).finished(CudaEvent(5))


def test_out_of_memory_says_what_there_is_and_what_to_do(cuda: StandIn) -> None:
    cuda.statuses["malloc"] = OUT_OF_MEMORY
    with pytest.raises(ConfigError, match=r"GPU 0 has 3.0 MiB free, not the 4.0 GiB .*lower"):
        CupyRuntime(0).allocate(2**32)


def test_another_failure_to_allocate_is_not_called_lack_of_memory(cuda: StandIn) -> None:
    cuda.statuses["malloc"] = LAUNCH_FAILURE
    with pytest.raises(PipemaxSystemError, match="allocate: cudaErrorLaunchFailure"):
        CupyRuntime(0).allocate(4096)


def test_an_ipc_handle_lends_nothing_but_its_allocation(cuda: StandIn) -> None:
    """Whole granules: CUDA puts no other allocation into them."""
    CupyRuntime(0).allocate(5 * 2**20 + 1)
    assert cuda.last() == ("malloc", 6 * 2**20)
    with pytest.raises(ValueError, match="0 bytes"):
        CupyRuntime(0).allocate(0)


def test_flags(cuda: StandIn) -> None:
    runtime = CupyRuntime(0)
    runtime.create_event(interprocess=True)
    assert cuda.last() == ("eventCreateWithFlags", 1 | 2 | 4)
    runtime.create_event(timed=True)
    assert cuda.last() == ("eventCreateWithFlags", 1)
    with pytest.raises(ValueError, match="times no event"):
        runtime.create_event(interprocess=True, timed=True)
    runtime.create_stream(urgent=True)
    assert cuda.last() == ("streamCreateWithPriority", 1, -1)
    runtime.register_host(4096, 100)
    assert cuda.last() == ("hostRegister", 4096, 100, 1)


def test_cupy_has_what_is_used_of_it() -> None:
    """By name and number of arguments: cupy's calls say their signatures in their docstrings."""
    cupy = pytest.importorskip("cupy")
    runtime = cupy.cuda.runtime
    source = inspect.getsource(cupy_runtime)
    used = set(re.findall(r"self\._cuda\.(\w+)", source))
    assert used >= {"memcpyAsync", "eventQuery", "check_status", "memcpyDefault"}
    assert not [name for name in used if not hasattr(runtime, name)]
    with pytest.raises(runtime.CUDARuntimeError) as error:
        runtime.check_status(NOT_READY)
    assert error.value.status == NOT_READY
    arguments = {
        "memcpyAsync": 5,
        "memsetAsync": 4,
        "hostRegister": 3,
        "streamCreateWithPriority": 2,
        "ipcOpenMemHandle": 2,
        "ipcOpenEventHandle": 1,
        "streamWaitEvent": 3,
        "eventElapsedTime": 2,
    }
    for name, count in arguments.items():
        signature = str(getattr(runtime, name).__doc__).split("\n")[0]
        assert len(signature.partition("(")[2].split(",")) == count, signature
