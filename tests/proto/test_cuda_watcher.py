"""Learning that a GPU has passed an event."""

import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipemax.proto.cuda.event_watcher import EventWatcher
from pipemax.proto.errors import PipemaxSystemError
from support.fake_cuda import FakeCuda, FakeCudaProcess, FakeMachine

LONG_S = 30.0


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[FakeCuda]:
    process = FakeCudaProcess(FakeMachine().at(tmp_path / "gpus"))
    yield process.open_runtime(0)
    process.die()


@pytest.fixture
def wake_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def watcher(gpu: FakeCuda, wake_fd: int) -> Iterator[EventWatcher[str]]:
    watcher: EventWatcher[str] = EventWatcher(gpu, "watcher", wake_fd)
    yield watcher
    watcher.close()


def is_woken(wake_fd: int, timeout_s: float = LONG_S) -> bool:
    readable, _, _ = select.select([wake_fd], [], [], timeout_s)
    if readable:
        os.eventfd_read(wake_fd)
    return bool(readable)


def test_events_are_told_in_order_as_they_pass(
    gpu: FakeCuda, watcher: EventWatcher[str], wake_fd: int
) -> None:
    gates = [threading.Event(), threading.Event()]
    streams = [gpu.create_stream() for _ in gates]
    for gate, stream, name in zip(gates, streams, ("first", "second"), strict=True):
        event = gpu.create_event()
        gpu.call(stream, lambda gate=gate: _wait(gate))  # type: ignore[misc]
        gpu.record(event, stream)
        watcher.watch(event, name)
    assert watcher.passed() == []
    gates[1].set()  # the first is still to come
    gpu.synchronize(streams[1])
    assert watcher.passed() == []
    gates[0].set()
    told: list[str] = []
    while len(told) < 2:
        assert is_woken(wake_fd)
        told += watcher.passed()
    assert told == ["first", "second"]
    assert watcher.passed() == []


def test_what_breaks_the_gpu_is_raised_after_what_passed(
    gpu: FakeCuda, watcher: EventWatcher[str], wake_fd: int
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    stream, good, bad = gpu.create_stream(), gpu.create_event(), gpu.create_event()
    gpu.record(good, stream)
    watcher.watch(good, "good")
    assert is_woken(wake_fd)
    gpu.call(stream, fail)
    gpu.record(bad, stream)
    watcher.watch(bad, "bad")
    assert is_woken(wake_fd)
    assert watcher.passed() == ["good"]
    with pytest.raises(PipemaxSystemError, match="ZeroDivisionError"):
        watcher.passed()


def test_closing_waits_for_no_event(
    gpu: FakeCuda, watcher: EventWatcher[str], wake_fd: int
) -> None:
    """And nothing is written to the eventfd afterwards, which may be another's by then."""
    gate, stream, event = threading.Event(), gpu.create_stream(), gpu.create_event()
    gpu.call(stream, lambda: _wait(gate))
    gpu.record(event, stream)
    watcher.watch(event, "late")
    watcher.close()
    gate.set()
    gpu.synchronize(stream)
    assert not is_woken(wake_fd, 0.1)
    assert watcher.passed() == []


def _wait(gate: threading.Event) -> None:
    gate.wait(LONG_S)
