"""KV blocks between a GPU and the host pool, through the shipped daemon, against one large copy.

    python ops/benchmarks/copies_cuda.py [--findings OUT] [--rehearse]

This process is the coordinator and the only stage; the daemon is the real one, with its own pieces,
messages and threads. Both ways of copying are measured: on the stage's streams as the daemon orders
(`stage`), and on the daemon's own (`daemon`). Times are from sending the order to the last block
being there. Beside them: how much device memory the daemon's context takes, how long the host pool
takes to be pinned once its pages are there, and how much slower a matrix product runs while blocks
move in both directions.
"""

import argparse
import contextlib
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zmq
from gpu_common import run
from gpu_findings import FindingsWriter

from pipemax.proto import cuda
from pipemax.proto.config import CudaDevice, EngineConfig, save_config
from pipemax.proto.cuda.runtime import CudaRuntime, Pointer
from pipemax.proto.memory import SharedMemory
from pipemax.proto.messages.control import (
    BlockMove,
    Drop,
    Hello,
    KvReady,
    Prefetch,
    Reset,
    ResetDone,
    Store,
    Stored,
    Welcome,
)
from pipemax.proto.messages.kv import AttachPool, CopyOrder, Loaded, PoolAttached
from pipemax.proto.messages.registry import CONTROL, KV
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import create_run_dir, socket_endpoint
from pipemax.proto.sockets import bind_router, connect_dealer, identity_of
from pipemax.proto.wire import Codec, encode
from pipemax.stage_worker.devices.cuda.copies import DevicePool, open_kv_end
from pipemax.stage_worker.devices.cuda.host_region import HostRegions

HERE = Path(__file__).resolve().parent
Mode = Literal["stage", "daemon"]
MODES: tuple[Mode, ...] = ("stage", "daemon")
SHARE_EACH, SHARE_BOTH = 0.85, 0.75
"""Targets: of one large pinned copy in one direction; of both such copies' sum, both at once."""
REPEATS = 3
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Sizes:
    block_bytes: int
    blocks: int
    """Moved in each measurement, in each direction."""
    matrix: int

    @property
    def bytes(self) -> int:
        return self.block_bytes * self.blocks


FULL = Sizes(block_bytes=2**20, blocks=512, matrix=8192)
"""A block of 16 tokens of half an 8B model in bf16; 512 MiB."""
SMALL = Sizes(block_bytes=8192, blocks=64, matrix=64)


@dataclass(frozen=True, slots=True)
class Link:
    """One large pinned copy, bytes per second; `both`: the sum, with one in each direction."""

    load: float
    store: float
    both: float


def measure_link(runtime: CudaRuntime, device: Pointer, size_bytes: int) -> Link:
    """Between `device`, of twice `size_bytes`, and registered memory as the pool is."""
    memory = SharedMemory.create("bench-pinned", 2 * size_bytes)
    memory.prefault()
    address = np.frombuffer(memory.buffer, np.uint8).ctypes.data
    runtime.register_host(address, 2 * size_bytes)
    streams = runtime.create_stream(), runtime.create_stream()

    def seconds(*directions: str) -> float:
        taken = []
        for _ in range(REPEATS + 1):
            began_s = time.perf_counter()
            for direction, stream in zip(directions, streams, strict=False):
                if direction == "load":
                    runtime.copy(device, address, size_bytes, stream)
                else:
                    runtime.copy(address + size_bytes, device + size_bytes, size_bytes, stream)
            for stream in streams:
                runtime.synchronize(stream)
            taken.append(time.perf_counter() - began_s)
        return statistics.median(taken[1:])  # the first one warms up

    link = Link(
        load=size_bytes / seconds("load"),
        store=size_bytes / seconds("store"),
        both=2 * size_bytes / seconds("load", "store"),
    )
    runtime.unregister_host(address)
    for stream in streams:
        runtime.destroy_stream(stream)
    memory.close()
    return link


class Rig:
    """The daemon, and this process as everything else.

    The device pool has room for what is loaded, and behind it for what is stored.
    """

    def __init__(self, run_dir: Path, runtime: CudaRuntime, mode: Mode, sizes: Sizes) -> None:
        self.runtime, self.sizes = runtime, sizes
        self._num_host = 4 * sizes.blocks
        config = EngineConfig(
            model="unused",
            served_model_name="unused",
            layer_split=(1,),
            max_model_len=64,
            device="cuda",
            cuda=CudaDevice(gpus=(0,), block_bytes=(sizes.block_bytes,), kv_copies=mode),
            kv_offloading_bytes=self._num_host * sizes.block_bytes,
        )
        save_config(config, run_dir)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = bind_router(self._context, socket_endpoint(run_dir, "control"), CONTROL)
        identity = identity_of("stage", 0)
        self._kv = connect_dealer(self._context, socket_endpoint(run_dir, "kv"), KV, identity)
        self._codecs = {self._control: Codec(CONTROL, at_binder=True)}
        self._codecs[self._kv] = Codec(KV, at_binder=False)
        self.pool = DevicePool(
            runtime.allocate(2 * sizes.bytes), 2 * sizes.blocks, sizes.block_bytes
        )
        self._regions = HostRegions(runtime, run_dir, 0)
        self._end = open_kv_end(config, runtime, self.pool, self._regions)
        self._poller = zmq.Poller()
        for source in (self._control, self._kv, self._end.fileno()):
            self._poller.register(source, zmq.POLLIN)
        self.compute = runtime.create_stream()
        self._heard: list[Message] = []
        self._stored = 0
        self._loaded: dict[int, int] = {}
        self._request = self._step = 0
        self.ready_s = self.attached_s = 0.0
        """When the daemon was ready, and when the pool was attached and pinned."""

    def begin(self) -> None:
        self._until(lambda: self._take(KvReady))
        self.ready_s = time.perf_counter()
        self._tell(Reset(epoch=1))
        offer = self._end.offer()
        attach = AttachPool(
            epoch=1,
            stage=0,
            incarnation="bench",
            handle=offer.handle,
            cuda=offer.cuda,
            num_blocks=self.pool.num_blocks,
            block_bytes=self.pool.block_bytes,
        )
        self._kv.send(encode(attach))
        self._until(lambda: self._end.attached)
        self.attached_s = time.perf_counter()
        self._until(lambda: self._take(ResetDone))

    def move(
        self,
        *directions: str,
        scattered: bool = False,
        beside: Callable[[], None] | None = None,
    ) -> float:
        """Seconds for `blocks` blocks in each of these directions; what is loaded was stored
        before. `beside` is called once the orders are sent."""
        count, draw = self.sizes.blocks, random.Random(1)
        if "load" in directions:
            self._keep_loadable(count)
        here, there = list(range(count)), list(range(count, 2 * count))
        if scattered:
            draw.shuffle(here)
            draw.shuffle(there)
        began_s = time.perf_counter()
        if "load" in directions:
            self._step += 1
            moves = tuple(BlockMove(0, i, device) for i, device in enumerate(here))
            self._tell(Prefetch(epoch=1, step=self._step, after=-1, blocks=moves))
        if "store" in directions:
            self._request += 1
            self._stored = 0
            stored = tuple(BlockMove(self._request, i, device) for i, device in enumerate(there))
            self._tell(Store(epoch=1, after=-1, blocks=stored))
        if beside is not None:
            beside()
        waiting_for_load = "load" in directions
        passed = self.runtime.create_event()

        def done() -> bool:
            nonlocal waiting_for_load
            if waiting_for_load and self._step in self._loaded:
                self._end.wait_loaded(self.compute, self._loaded[self._step])
                self.runtime.record(passed, self.compute)
                waiting_for_load = False
            loaded = "load" not in directions or (
                not waiting_for_load and self.runtime.finished(passed)
            )
            return loaded and ("store" not in directions or self._stored == count)

        self._until(done, timeout_ms=0 if "load" in directions else 50)
        seconds = time.perf_counter() - began_s
        if "store" in directions:
            self._tell(Drop(epoch=1, request=self._request, first_index=0))
        self.runtime.destroy_event(passed)
        return seconds

    def close(self) -> None:
        self._end.close()
        self._regions.close()
        self.runtime.free(self.pool.pointer)
        self.runtime.destroy_stream(self.compute)
        self._context.destroy(linger=0)

    def _keep_loadable(self, count: int) -> None:
        """Request 0 has its blocks in the host pool."""
        if self._loaded or self._step:
            return
        self._stored = 0
        moves = tuple(BlockMove(0, i, i) for i in range(count))
        self._tell(Store(epoch=1, after=-1, blocks=moves))
        self._until(lambda: self._stored == count)

    def _tell(self, message: Message) -> None:
        self._control.send_multipart([identity_of("kv_daemon"), encode(message)])

    def _take(self, kind: type[Message]) -> bool:
        return any(isinstance(message, kind) for message in self._heard)

    def _until(self, done: Callable[[], bool], timeout_ms: int = 50) -> None:
        give_up_s = time.perf_counter() + DEADLINE_S
        while not done():
            if time.perf_counter() > give_up_s:
                raise TimeoutError("the daemon does not answer; see its log above")
            for source, _ in self._poller.poll(timeout_ms):
                if isinstance(source, zmq.Socket):
                    self._read(source)
                else:
                    for ended in self._end.ended():
                        self._kv.send(encode(ended))

    def _read(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            match self._codecs[socket].decode(frames[-1]):
                case Hello():
                    self._tell(Welcome(instance_id="bench"))
                case Stored(indices=indices):
                    self._stored += len(indices)
                case Loaded(step=step, copy=copy):
                    self._loaded[step] = copy
                case CopyOrder() as order:
                    self._end.order(order)
                case PoolAttached() as answer:
                    self._end.attach(answer)
                case message:
                    self._heard.append(message)


@contextlib.contextmanager
def daemon(run_dir: Path, *, simulated: bool) -> Iterator[subprocess.Popen[bytes]]:
    program = [str(HERE / "gpu_simulated_daemon.py")] if simulated else ["-m", "pipemax.kv_daemon"]
    process = subprocess.Popen([sys.executable, *program, "--run-dir", str(run_dir)])
    try:
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


class Matrices:
    """A matrix product again and again, on a stream of its own."""

    def __init__(self, runtime: CudaRuntime, size: int) -> None:
        import torch

        self._torch, self._stream = torch, runtime.create_stream()
        device = torch.device("cuda", runtime.gpu)
        self._external = torch.cuda.ExternalStream(self._stream, device=device)
        self._a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        self._out = torch.empty_like(self._a)
        torch.cuda.synchronize(device)
        self.queue(10)
        self.seconds()

    def queue(self, count: int) -> None:
        torch = self._torch
        self._count = count
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._external):
            self._begin.record()
            for _ in range(count):
                torch.mm(self._a, self._a, out=self._out)
            self._end.record()

    def seconds(self) -> float:
        """Of one product, of those queued last; waits for them."""
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3 / self._count


def overlap(rig: Rig, found: FindingsWriter, mode: Mode, seconds: float) -> None:
    """`seconds`: how long both directions take together."""
    matrices = Matrices(rig.runtime, rig.sizes.matrix)
    matrices.queue(20)
    alone_s = matrices.seconds()
    count = max(1, round(0.8 * seconds / alone_s))
    slowed = []
    for _ in range(REPEATS):
        rig.move("load", "store", beside=lambda: matrices.queue(count))
        slowed.append(matrices.seconds() / alone_s - 1)
    name = f"{mode}: a matrix product is slowed by copies both ways by"
    found.figure(name, 100 * statistics.median(slowed), "%")


def measure(rig: Rig, link: Link, found: FindingsWriter, mode: Mode, *, targets: bool) -> float:
    """Returns how long both directions together took."""
    size, both_s = rig.sizes.bytes, 0.0
    ways: tuple[tuple[tuple[str, ...], float, float], ...] = (
        (("load",), link.load, SHARE_EACH),
        (("store",), link.store, SHARE_EACH),
        (("load", "store"), link.load + link.store, SHARE_BOTH),
    )
    for directions, raw, share in ways:
        for scattered in (False, True):
            rig.move(*directions, scattered=scattered)
            seconds = statistics.median(
                rig.move(*directions, scattered=scattered) for _ in range(REPEATS)
            )
            rate = len(directions) * size / seconds
            name = f"{mode}: {' and '.join(directions)}, {'scattered' if scattered else 'in order'}"
            found.figure(name, rate / 1e9, "GB/s")
            if not scattered:
                both_s = seconds
            found.figure(
                f"{name}, share of large copies",
                rate / raw,
                at_least=share if targets and not scattered else None,
            )
    return both_s


def simulate(run_dir: Path) -> Any:
    """A simulated GPU in the place of CUDA, in this process and the daemon's; returns the process's
    end of it."""
    sys.path.append(str(HERE.parents[1] / "tests"))
    from support.fake_cuda import FakeCudaProcess
    from support.fake_cuda.machine import FakeMachine, gpu_dir

    process = FakeCudaProcess(FakeMachine(gpu_bytes=64 * 2**20).at(gpu_dir(run_dir)))
    cuda.open_runtime = process.open_runtime  # type: ignore[assignment]
    return process


def one_mode(mode: Mode, found: FindingsWriter, *, rehearse: bool) -> None:
    sizes = SMALL if rehearse else FULL
    run_dir = create_run_dir(f"bench-copies-{mode}")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        if rehearse:
            stack.callback(simulate(run_dir).close)
        runtime = cuda.open_runtime(0)
        rig = Rig(run_dir, runtime, mode, sizes)
        stack.callback(rig.close)
        link = measure_link(runtime, rig.pool.pointer, sizes.bytes)
        for name, rate in (("load", link.load), ("store", link.store), ("both", link.both)):
            found.figure(f"{mode}: one large pinned copy, {name}", rate / 1e9, "GB/s")
        before, _ = runtime.memory()
        stack.enter_context(daemon(run_dir, simulated=rehearse))
        rig.begin()
        taken = before - runtime.memory()[0]
        found.figure(f"{mode}: device memory of the daemon", taken / 2**20, "MiB")
        found.figure(
            f"{mode}: attached after the daemon was ready", rig.attached_s - rig.ready_s, "s"
        )
        both_s = measure(rig, link, found, mode, targets=not rehearse)
        if rehearse:
            found.skip(f"{mode}: how copies slow computing: needs a GPU")
        else:
            overlap(rig, found, mode, both_s)


def part(asked: argparse.Namespace, found: FindingsWriter, folder: Path) -> None:
    for mode in MODES:
        one_mode(mode, found, rehearse=asked.rehearse)


if __name__ == "__main__":
    sys.exit(run(__doc__, part))
