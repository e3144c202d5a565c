"""The daemon as a process between stages on simulated GPUs, in both ways of copying."""

import contextlib
import select
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from typing import TypeVar

import pytest
import zmq

from pipemax.proto.config import CudaDevice, EngineConfig, save_config
from pipemax.proto.messages.control import (
    BlockMove,
    Failure,
    Hello,
    KvReady,
    KvReport,
    Prefetch,
    Reset,
    ResetDone,
    Store,
    Stored,
    Welcome,
)
from pipemax.proto.messages.kv import Computed, CopyOrder, Loaded, PoolAttached
from pipemax.proto.messages.registry import CONTROL, KV, Channel
from pipemax.proto.messages.types import Message
from pipemax.proto.process import EXIT_FATAL, error_file
from pipemax.proto.rundir import create_run_dir, socket_endpoint
from pipemax.proto.sockets import bind_router, connect_dealer, identity_of
from pipemax.proto.wire import Codec, encode
from support.fake_cuda.bodies import blocking_calls
from support.fake_cuda.machine import FakeMachine, gpu_dir
from support.forkserver import log_of, start_process, stop_process
from support.kv_on_gpu import GpuStage

BLOCK_BYTES = (3000, 5000)
NUM_HOST, NUM_DEVICE = 8, 6
DEADLINE_S = 60.0
BOTH = pytest.mark.parametrize("copies", ["stage", "daemon"])
M = TypeVar("M", bound=Message)


class Socket:
    """One socket and what has come through it."""

    def __init__(self, socket: zmq.Socket[bytes], channel: Channel, *, at_binder: bool) -> None:
        self.socket = socket
        self._codec = Codec(channel, at_binder=at_binder)

    def read(self) -> Iterator[Message]:
        while self.socket.poll(0):
            yield self._codec.decode(self.socket.recv_multipart()[-1])


class System:
    def __init__(self, copies: str, block_bytes: tuple[int, ...] = BLOCK_BYTES) -> None:
        self.run_dir = create_run_dir("kv")
        self._copies = copies
        self._machine = FakeMachine(delay_s=0.001).at(gpu_dir(self.run_dir))
        config = EngineConfig(
            model="unused",
            served_model_name="unused",
            pipeline_parallel_size=2,
            layer_split=(1, 1),
            max_model_len=64,
            device="cuda",
            cuda=CudaDevice(gpus=(0, 0), block_bytes=block_bytes, kv_copies=copies),  # type: ignore[arg-type]
            kv_offloading_bytes=NUM_HOST * sum(block_bytes),
        )
        save_config(config, self.run_dir)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        control = bind_router(self._context, socket_endpoint(self.run_dir, "control"), CONTROL)
        self.control = Socket(control, CONTROL, at_binder=True)
        self.told: list[Message] = []
        self.stages = [self._new_stage(index) for index in (0, 1)]
        self.sockets = [self._new_socket(index) for index in (0, 1)]
        self.process = self._start()

    def _new_stage(self, index: int) -> GpuStage:
        size = BLOCK_BYTES[index]
        return GpuStage(self._machine, self.run_dir, index, self._copies, NUM_DEVICE, size)

    def _new_socket(self, index: int) -> Socket:
        endpoint, identity = socket_endpoint(self.run_dir, "kv"), identity_of("stage", index)
        return Socket(connect_dealer(self._context, endpoint, KV, identity), KV, at_binder=False)

    def _start(self) -> ForkServerProcess:
        return start_process("kv-daemon", "support.fake_cuda.bodies:kv_daemon", self.run_dir)

    def kill_daemon(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.told.clear()
        self.process = self._start()

    def tell(self, message: Message) -> None:
        self.control.socket.send_multipart([identity_of("kv_daemon"), encode(message)])

    def turn(self) -> None:
        """What coordinator and stages do when something has come."""
        sources = [self.control.socket.FD, *(socket.socket.FD for socket in self.sockets)]
        select.select([*sources, *(stage.kv.fileno() for stage in self.stages)], [], [], 0.01)
        for message in self.control.read():
            if isinstance(message, Hello):
                self.tell(Welcome(instance_id="test"))
            self.told.append(message)
        for stage, socket in zip(self.stages, self.sockets, strict=True):
            for message in socket.read():
                match message:
                    case CopyOrder():
                        stage.kv.order(message)
                    case PoolAttached():
                        stage.kv.attach(message)
                    case Loaded():
                        stage.loaded[message.step] = message.copy
            for ended in stage.kv.ended():
                socket.socket.send(encode(ended))

    def until(self, done: Callable[[], object]) -> None:
        give_up_s = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < give_up_s, log_of(self.run_dir, "kv-daemon")
            self.turn()

    def next(self, kind: type[M]) -> M:
        """Waits for a message of this kind to the coordinator, and takes it."""
        found: list[M] = []
        self.until(lambda: found.extend(m for m in self.told if isinstance(m, kind)) or found)
        self.told.remove(found[0])
        return found[0]

    def begin(self, epoch: int) -> KvReady:
        ready = self.next(KvReady)
        self.tell(Reset(epoch=epoch))
        for stage, socket in zip(self.stages, self.sockets, strict=True):
            stage.kv.detach()
            socket.socket.send(encode(stage.offer(epoch)))
        self.until(lambda: all(stage.kv.attached for stage in self.stages))
        assert self.next(ResetDone) == ResetDone(epoch=epoch, num_host_blocks=NUM_HOST)
        return ready

    def queue(self, epoch: int, step: int, reads: dict[int, int], fills: dict[int, int]) -> None:
        for stage, socket in zip(self.stages, self.sockets, strict=True):
            event = stage.queue_step(stage.loaded.get(step, -1), reads, fills)
            socket.socket.send(encode(Computed(epoch=epoch, step=step, event=event)))

    def store_and_load(self, epoch: int) -> None:
        """What one step fills comes back to another block for the next."""
        self.tell(Store(epoch=epoch, after=0, blocks=(BlockMove(1, 0, 2), BlockMove(1, 1, 3))))
        self.queue(epoch, 0, {}, {2: 20 + epoch, 3: 30 + epoch})
        self.next(Stored)
        self.tell(Prefetch(epoch=epoch, step=1, after=0, blocks=(BlockMove(1, 1, 2),)))
        self.until(lambda: all(1 in stage.loaded for stage in self.stages))
        self.queue(epoch, 1, {2: 30 + epoch}, {})
        for stage in self.stages:
            stage.runtime.synchronize(stage.compute)
            assert not stage.wrong
            stage.loaded.clear()

    def close(self) -> None:
        if self.process.is_alive():
            stop_process(self.process)
        for stage in self.stages:
            stage.close()
        self._context.destroy(linger=0)


@contextlib.contextmanager
def running(copies: str, block_bytes: tuple[int, ...] = BLOCK_BYTES) -> Iterator[System]:
    system = System(copies, block_bytes)
    try:
        yield system
    finally:
        system.close()


@BOTH
def test_blocks_go_and_come_back(copies: str) -> None:
    with running(copies) as system:
        ready = system.begin(1)
        assert ready.pool_bytes == NUM_HOST * sum(BLOCK_BYTES)
        system.store_and_load(1)
        report = system.next(KvReport)
        while report.links[1].load_bytes == 0:
            report = system.next(KvReport)
        assert [link.store_bytes for link in report.links] == [2 * size for size in BLOCK_BYTES]
        assert [link.load_bytes for link in report.links] == list(BLOCK_BYTES)
        assert all(link.load_seconds > 0 for link in report.links)
        begun_s = time.monotonic()
        assert system.process.pid is not None
        system.process.terminate()
        system.process.join(DEADLINE_S)
        assert system.process.exitcode == 0
        calls = blocking_calls(system.run_dir, "kv-daemon")
        loop = [c for c in calls if c.thread == "MainThread" and c.at_s < begun_s]
        assert [call for call in loop if call.call.startswith("synchronize")] == []
        assert bool(calls) == (copies == "daemon"), "a daemon that gives orders has no GPU"


@BOTH
def test_another_daemon_takes_over(copies: str) -> None:
    """Killed, and started again: the stages let go of what the dead one had, and attach."""
    with running(copies) as system:
        system.begin(1)
        system.store_and_load(1)
        system.kill_daemon()
        system.begin(2)
        system.store_and_load(2)


@BOTH
def test_a_model_of_other_blocks_ends_it_for_good(copies: str) -> None:
    with running(copies, (3000, 4096)) as system:
        system.next(KvReady)
        system.tell(Reset(epoch=1))
        for stage, socket in zip(system.stages, system.sockets, strict=True):
            socket.socket.send(encode(stage.offer(1)))
        assert "cuda.block_bytes says [3000, 4096]" in system.next(Failure).error
        system.process.join(DEADLINE_S)
        assert system.process.exitcode == EXIT_FATAL
        assert "start the system again" in error_file(system.run_dir, "kv-daemon").read_text()
