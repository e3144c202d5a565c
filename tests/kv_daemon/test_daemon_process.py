"""The daemon as a process, between a coordinator and two stages played by the test."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import zmq

from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.config import EngineConfig, save_config
from pipemax.proto.memory import SharedMemory
from pipemax.proto.messages.control import (
    Beat,
    BlockMove,
    Failure,
    Hello,
    KvReady,
    KvReport,
    Prefetch,
    Release,
    Released,
    Reset,
    ResetDone,
    Stop,
    Store,
    Stored,
    Welcome,
)
from pipemax.proto.messages.kv import AttachPool, Computed, Loaded, PoolAttached
from pipemax.proto.messages.registry import CONTROL, KV
from pipemax.proto.messages.types import Message
from pipemax.proto.process import EXIT_FATAL, error_file
from pipemax.proto.rundir import create_run_dir, socket_endpoint
from pipemax.proto.sockets import bind_router, connect_dealer, identity_of
from pipemax.proto.wire import Codec, encode

BLOCK_BYTES = (512, 768)
NUM_DEVICE = 8
NUM_HOST = 6
DEADLINE_S = 60.0
M = TypeVar("M", bound=Message)
Context = zmq.Context[zmq.Socket[bytes]]


class Inbox:
    """Messages from the daemon on one socket, until they are asked for by type."""

    def __init__(self, socket: zmq.Socket[bytes], codec: Codec) -> None:
        self.socket = socket
        self._codec = codec
        self._waiting: list[Message] = []

    def next(self, kind: type[M]) -> M:
        """The next message of this type; those of other types stay."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for message in self._waiting:
                if isinstance(message, kind):
                    self._waiting.remove(message)
                    return message
            left_ms = int(1000 * (deadline - time.monotonic()))
            if left_ms <= 0 or not self.socket.poll(left_ms):
                raise TimeoutError(f"no {kind.__name__}; there is {self._waiting}")
            self._waiting.append(self._codec.decode(self.socket.recv_multipart()[-1]))


class Coordinator(Inbox):
    def __init__(self, context: Context, run_dir: Path) -> None:
        socket = bind_router(context, socket_endpoint(run_dir, "control"), CONTROL)
        super().__init__(socket, Codec(CONTROL, at_binder=True))

    def send(self, message: Message) -> None:
        self.socket.send_multipart([identity_of("kv_daemon"), encode(message)])

    def greet(self, instance_id: str = "test") -> Hello:
        hello = self.next(Hello)
        self.send(Welcome(instance_id=instance_id))
        self.next(KvReady)
        return hello


class Stage(Inbox):
    def __init__(self, context: Context, run_dir: Path, index: int) -> None:
        identity = identity_of("stage", index)
        socket = connect_dealer(context, socket_endpoint(run_dir, "kv"), KV, identity)
        super().__init__(socket, Codec(KV, at_binder=False))
        self.index = index
        self.memory = SharedMemory.create("test-device", NUM_DEVICE * BLOCK_BYTES[index])
        blocks = np.frombuffer(self.memory.buffer, np.uint8)
        self.blocks = blocks.reshape(NUM_DEVICE, BLOCK_BYTES[index])

    def send(self, message: Message) -> None:
        self.socket.send(encode(message))

    def attach(self, epoch: int, block_bytes: int | None = None) -> None:
        offer = AttachPool(
            epoch=epoch,
            stage=self.index,
            handle=self.memory.handle,
            num_blocks=NUM_DEVICE,
            block_bytes=block_bytes or BLOCK_BYTES[self.index],
        )
        self.send(offer)

    def close(self) -> None:
        self.socket.close(linger=0)
        del self.blocks
        self.memory.close()


class System:
    """A daemon, and all around it."""

    def __init__(self, kv_offloading_bytes: int) -> None:
        self.run_dir = create_run_dir("kv")
        config = EngineConfig(
            model="unused",
            served_model_name="unused",
            pipeline_parallel_size=2,
            layer_split=(1, 1),
            max_model_len=64,
            kv_offloading_bytes=kv_offloading_bytes,
        )
        save_config(config, self.run_dir)
        self.log_path = self.run_dir / "log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipemax.kv_daemon", "--run-dir", str(self.run_dir)],
                stderr=log,
            )
        self.context: Context = zmq.Context()
        self.coordinator = Coordinator(self.context, self.run_dir)
        self.stages = [Stage(self.context, self.run_dir, index) for index in (0, 1)]

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def begin(self, epoch: int) -> ResetDone:
        self.coordinator.send(Reset(epoch=epoch))
        for stage in self.stages:
            stage.attach(epoch)
        for stage in self.stages:
            assert stage.next(PoolAttached) == PoolAttached(epoch=epoch)
        return self.coordinator.next(ResetDone)

    def restart(self, index: int) -> Stage:
        self.stages[index].close()
        self.stages[index] = Stage(self.context, self.run_dir, index)
        return self.stages[index]

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stage in self.stages:
            stage.close()
        self.coordinator.socket.close(linger=0)
        self.context.term()


@contextlib.contextmanager
def running(kv_offloading_bytes: int = NUM_HOST * sum(BLOCK_BYTES)) -> Iterator[System]:
    system = System(kv_offloading_bytes)
    try:
        yield system
    finally:
        system.close()


@pytest.fixture
def system() -> Iterator[System]:
    with running() as system:
        hello = system.coordinator.greet()
        assert (hello.role, hello.protocol) == ("kv_daemon", PROTOCOL_VERSION)
        assert hello.pid == system.process.pid
        yield system


def moves(*blocks: tuple[int, int, int]) -> tuple[BlockMove, ...]:
    return tuple(BlockMove(*block) for block in blocks)


def test_blocks_outlive_a_stage(system: System) -> None:
    """Stored, loaded, then a stage dies and its successor gets the same blocks."""
    coordinator, stages = system.coordinator, system.stages
    assert system.begin(1) == ResetDone(epoch=1, num_host_blocks=NUM_HOST)
    contents = []
    for stage in stages:
        values = np.random.default_rng(stage.index).integers(0, 256, stage.blocks.shape, np.uint8)
        stage.blocks[:] = values
        contents.append(values)
    coordinator.send(Store(epoch=1, after=0, blocks=moves((7, 0, 2), (7, 1, 3), (9, 0, 5))))
    for stage in stages:
        stage.send(Computed(epoch=1, step=0))
    stored = coordinator.next(Stored)
    assert sorted(zip(stored.requests, stored.indices, strict=True)) == [(7, 0), (7, 1), (9, 0)]

    coordinator.send(Prefetch(epoch=1, step=1, after=0, blocks=moves((7, 1, 6), (9, 0, 0))))
    for stage, values in zip(stages, contents, strict=True):
        assert stage.next(Loaded) == Loaded(epoch=1, step=1)
        assert (stage.blocks[6] == values[3]).all()
        assert (stage.blocks[0] == values[5]).all()

    system.restart(1)
    assert system.begin(2).num_host_blocks == NUM_HOST
    coordinator.send(Prefetch(epoch=2, step=2, after=-1, blocks=moves((7, 0, 1), (7, 1, 2))))
    for stage, values in zip(stages, contents, strict=True):
        assert stage.next(Loaded) == Loaded(epoch=2, step=2)
        assert (stage.blocks[1:3] == values[2:4]).all()
    coordinator.send(Release(epoch=2, requests=(7, 9)))
    assert sorted(coordinator.next(Released).requests) == [7, 9]
    system.process.send_signal(signal.SIGTERM)
    assert system.wait() == 0


def test_it_reports_and_beats(system: System) -> None:
    coordinator = system.coordinator
    system.begin(1)
    coordinator.send(Store(epoch=1, after=-1, blocks=moves((0, 0, 0), (0, 1, 1))))
    coordinator.next(Stored)
    report = coordinator.next(KvReport)
    while report.host_blocks_used < 2 or report.links[1].store_bytes == 0:
        report = coordinator.next(KvReport)
    assert report.host_blocks_total == NUM_HOST
    assert [link.store_bytes for link in report.links] == [2 * size for size in BLOCK_BYTES]
    assert [link.store_copies for link in report.links] == [1, 1]
    assert report.queued_load_bytes == (0, 0)
    coordinator.next(Beat)
    coordinator.next(Beat)
    coordinator.send(Stop())
    assert system.wait() == 0


def test_bad_messages_and_vanished_stages_cost_nobody_anything(system: System) -> None:
    coordinator, stages = system.coordinator, system.stages
    stages[0].socket.send(os.urandom(64))
    stages[0].socket.send_multipart([b"a", b"b"])
    stages[1].send(Loaded(epoch=1, step=0))
    stages[1].send(
        AttachPool(epoch=1, stage=0, handle=stages[1].memory.handle, num_blocks=1, block_bytes=1)
    )
    stages[0].attach(epoch=1, block_bytes=10**6)  # more than its segment holds
    stranger = connect_dealer(system.context, socket_endpoint(system.run_dir, "kv"), KV, b"stage-7")
    stranger.send(encode(Computed(epoch=1, step=0)))
    coordinator.socket.send_multipart([identity_of("kv_daemon"), b"\xc1"])
    system.begin(1)
    coordinator.send(Store(epoch=1, after=-1, blocks=moves((0, 0, 0))))
    coordinator.next(Stored)
    stages[0].socket.close(linger=0)
    stages[0].socket = stages[1].socket  # for close()
    coordinator.send(Prefetch(epoch=1, step=1, after=-1, blocks=moves((0, 0, 1))))
    assert stages[1].next(Loaded) == Loaded(epoch=1, step=1)
    assert system.process.poll() is None
    stranger.close(linger=0)
    for text in ("not one complete", "is one frame", "type 'loaded'", "as stage 0", "not attached"):
        assert text in system.log
    assert "b'stage-7' on the kv socket" in system.log


def test_it_says_hello_until_it_is_welcome() -> None:
    with running() as system:
        first = system.coordinator.next(Hello)
        assert system.coordinator.next(Hello).incarnation == first.incarnation
        system.coordinator.send(Welcome(instance_id="one"))
        assert system.coordinator.next(KvReady) == KvReady(pool_bytes=NUM_HOST * sum(BLOCK_BYTES))


def test_a_new_coordinator_starts_from_nothing(system: System) -> None:
    """Its epochs are lower and its requests others, although they have the same numbers."""
    system.begin(5)
    system.coordinator.send(Store(epoch=5, after=-1, blocks=moves((0, 0, 0))))
    system.coordinator.next(Stored)
    system.coordinator.socket.close(linger=0)
    system.coordinator = Coordinator(system.context, system.run_dir)
    system.coordinator.greet("another")
    assert system.begin(1) == ResetDone(epoch=1, num_host_blocks=NUM_HOST)
    report = system.coordinator.next(KvReport)
    while report.host_blocks_used:
        report = system.coordinator.next(KvReport)
    system.stages[0].blocks[1] = 9
    system.coordinator.send(Store(epoch=1, after=-1, blocks=moves((0, 0, 1))))
    system.coordinator.next(Stored)
    system.coordinator.send(Prefetch(epoch=1, step=0, after=-1, blocks=moves((0, 0, 2))))
    system.stages[0].next(Loaded)
    assert (system.stages[0].blocks[2] == 9).all()


def test_a_contradiction_ends_it_for_a_restart(system: System) -> None:
    """Status 1, not 78: the launcher starts it again, empty."""
    system.begin(1)
    system.coordinator.send(Prefetch(epoch=1, step=3, after=-1, blocks=moves((4, 2, 0))))
    assert "block 2 of request 4" in system.coordinator.next(Failure).error
    assert system.wait() == 1
    assert "ContradictionError: prefetch for step 3" in system.log


def test_a_stage_of_another_shape_ends_it_for_good(system: System) -> None:
    system.begin(1)
    system.coordinator.send(Reset(epoch=2))
    system.stages[1].attach(epoch=2, block_bytes=64)
    assert "blocks of 64 bytes instead of 768" in system.coordinator.next(Failure).error
    assert system.wait() == EXIT_FATAL
    assert "restart the whole system" in error_file(system.run_dir, "kv-daemon").read_text()


def test_without_host_memory_it_holds_nothing() -> None:
    with running(kv_offloading_bytes=0) as system:
        system.coordinator.greet()
        assert system.begin(1).num_host_blocks == 0


def test_more_host_memory_than_there_is_is_one_line() -> None:
    with running(kv_offloading_bytes=2**60) as system:
        assert system.wait() == EXIT_FATAL
        reason = error_file(system.run_dir, "kv-daemon").read_text()
        assert reason.startswith("--kv-offloading-size 1048576.0 TiB is more than")
        assert reason.count("\n") == 1
