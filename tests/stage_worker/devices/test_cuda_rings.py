"""Rows between two stages on simulated GPUs, each as if it were a process of its own."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from pipemax.proto.config import CudaDevice, EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.stage_worker.channels.connect import Neighbours, open_neighbours
from pipemax.stage_worker.channels.keys import create_activation_keys
from pipemax.stage_worker.channels.receiver import Arrival
from pipemax.stage_worker.channels.ring import RingShape
from pipemax.stage_worker.devices.cuda.buffers import Gpu
from pipemax.stage_worker.devices.cuda.rings import CudaRings
from support.fake_cuda import FakeCudaProcess, FakeMachine
from support.fake_cuda.torch_side import open_torch

SHAPE = RingShape(num_slots=3, max_rows=8, hidden_size=16, dtype="float32")
DEADLINE_S = 20.0


def config_of(gpus: tuple[int, ...] = (0, 0), transport: str = "auto") -> EngineConfig:
    return EngineConfig(
        model="none",
        served_model_name="none",
        pipeline_parallel_size=2,
        layer_split=(1, 1),
        max_model_len=64,
        device="cuda",
        cuda=CudaDevice(gpus=gpus, block_bytes=(1, 1)),
        activation_transport=transport,  # type: ignore[arg-type]
    )


class Stage:
    """The rings of one stage, without a model."""

    def __init__(
        self,
        machine: FakeMachine,
        config: EngineConfig,
        stage: int,
        run_dir: Path,
        visible: tuple[int, ...] | None = None,
    ) -> None:
        assert config.cuda is not None
        self.process = FakeCudaProcess(machine, visible)
        self.runtime = self.process.open_runtime(config.cuda.gpus[stage])
        self.gpu = Gpu(self.runtime, open_torch(self.runtime))
        self.compute = self.runtime.create_stream()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._open: list[Callable[[], None]] = []
        try:
            self.rings = CudaRings(self.gpu, config, stage, SHAPE, self.compute)
            self._open.append(self.rings.close)
            self.neighbours: Neighbours = open_neighbours(
                self._context, config, run_dir, stage=stage, memory=self.rings, shape=SHAPE
            )
            self._open.append(self.neighbours.close)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._open:
            self._open.pop()()
        self._context.destroy(linger=0)
        self.process.close()


@contextlib.contextmanager
def pair(
    directory: Path, config: EngineConfig, other: EngineConfig | None = None, **knobs: Any
) -> Iterator[tuple[Stage, Stage]]:
    """Sender and receiver, which may differ in what they were told."""
    visible = knobs.pop("visible", None)
    run_dir = directory / "run"
    for folder in (run_dir, directory / "gpu"):
        folder.mkdir(mode=0o700)
    if config.activation_transport == "tcp":
        create_activation_keys(run_dir)
    machine = FakeMachine(directory=str(directory / "gpu"), num_gpus=2, **knobs)
    with contextlib.ExitStack() as stack:
        receiver = Stage(machine, other or config, 1, run_dir, visible)
        stack.callback(receiver.close)
        sender = Stage(machine, config, 0, run_dir)
        stack.callback(sender.close)
        yield sender, receiver


def agree(sender: Stage, receiver: Stage, epoch: int = 1) -> None:
    assert sender.neighbours.next is not None
    assert receiver.neighbours.previous is not None
    sender.neighbours.reset(epoch)
    receiver.neighbours.reset(epoch)
    deadline_s = time.monotonic() + DEADLINE_S
    while not (sender.neighbours.agreed and receiver.neighbours.agreed):
        assert time.monotonic() < deadline_s, "no agreement"
        sender.neighbours.offer()
        time.sleep(0.01)
        assert list(receiver.neighbours.previous.poll()) == []
        sender.neighbours.next.poll()


def send(sender: Stage, step: int, rows: torch.Tensor, epoch: int = 1) -> None:
    """As a step does: queues everything, and announces at once what may be."""
    outlet, slot, count = sender.rings.outlet, step % SHAPE.num_slots, len(rows)
    assert outlet is not None
    assert sender.neighbours.next is not None
    target = outlet.open(slot, sender.compute)

    def kernels() -> None:
        target[:count].copy_(rows)

    sender.gpu.torch.launch(sender.compute, kernels)
    queued = outlet.shut(slot, count, sender.compute)
    if not outlet.announces_ahead:
        sender.runtime.synchronize(outlet.stream)
    sender.neighbours.next.send(epoch, step, slot, queued)


def take(receiver: Stage, arrival: Arrival) -> list[torch.Tensor]:
    """What kernels see; there once everything has run."""
    inlet = receiver.rings.inlet
    assert inlet is not None
    seen: list[torch.Tensor] = []
    hidden = inlet.take(arrival.rows, receiver.compute)
    receiver.gpu.torch.launch(receiver.compute, lambda: seen.append(hidden.clone()))
    inlet.release(receiver.compute)
    return seen


def arrivals(receiver: Stage, count: int) -> list[Arrival]:
    found: list[Arrival] = []
    deadline_s = time.monotonic() + DEADLINE_S
    assert receiver.neighbours.previous is not None
    while len(found) < count:
        assert time.monotonic() < deadline_s, "nothing came"
        found += receiver.neighbours.previous.poll()
    return found


@pytest.mark.parametrize(
    ("transport", "gpus"), [("ipc", (0, 0)), ("shm", (0, 0)), ("shm", (0, 1)), ("tcp", (0, 1))]
)
def test_rows_arrive_as_sent(tmp_path: Path, transport: str, gpus: tuple[int, ...]) -> None:
    """Three steps at a time are queued ahead, then their slots are free again. Between GPUs that do
    not reach each other nothing is announced before it is there."""
    with pair(tmp_path, config_of(gpus, transport), delay_s=0.002) as (sender, receiver):
        assert sender.rings.outlet is not None
        assert sender.rings.outlet.announces_ahead is (gpus == (0, 0))
        assert sender.neighbours.transport == receiver.neighbours.transport == transport
        agree(sender, receiver)
        draw = torch.Generator().manual_seed(1)
        for begin in range(0, 12, SHAPE.num_slots):
            sent = [
                torch.randn(1 + (begin + i) % SHAPE.max_rows, SHAPE.hidden_size, generator=draw)
                for i in range(SHAPE.num_slots)
            ]
            for index, rows in enumerate(sent):
                send(sender, begin + index, rows)
            came = arrivals(receiver, len(sent))
            assert [arrival.step for arrival in came] == list(range(begin, begin + len(sent)))
            seen = [take(receiver, arrival) for arrival in came]
            receiver.runtime.synchronize(receiver.compute)
            for rows, found in zip(sent, seen, strict=True):
                assert torch.equal(found[0], rows)


@pytest.mark.parametrize("transport", ["ipc", "shm"])
def test_a_sender_that_starts_again_is_mapped_again(tmp_path: Path, transport: str) -> None:
    """And what its former life had is given back once nothing of it is in use."""
    config = config_of(transport=transport)
    run_dir = tmp_path / "run"
    with pair(tmp_path, config) as (sender, receiver):
        agree(sender, receiver)
        send(sender, 0, torch.ones(2, SHAPE.hidden_size))
        take(receiver, arrivals(receiver, 1)[0])
        receiver.runtime.synchronize(receiver.compute)
        held = receiver.process.machine.held_bytes(0)
        successor = Stage(receiver.process.machine, config, 0, run_dir)
        try:
            sender.neighbours.close()
            agree(successor, receiver, epoch=2)
            receiver.rings.collect()
            rows = torch.full((3, SHAPE.hidden_size), 5.0)
            send(successor, 0, rows, epoch=2)
            seen = take(receiver, arrivals(receiver, 1)[0])
            receiver.runtime.synchronize(receiver.compute)
            assert torch.equal(seen[0], rows)
            spans = [s for s in receiver.process.space.spans() if s.kind == "mapped"]
            assert len(spans) == (transport == "ipc")
            assert receiver.process.machine.held_bytes(0) >= held
        finally:
            successor.close()


@pytest.mark.parametrize(
    ("gpus", "peers", "chosen"),
    [((0, 0), (), "ipc"), ((0, 1), ((0, 1),), "ipc"), ((0, 1), (), "shm")],
)
def test_the_best_that_can_be(
    tmp_path: Path, gpus: tuple[int, ...], peers: tuple[tuple[int, int], ...], chosen: str
) -> None:
    with pair(tmp_path, config_of(gpus), peers=peers) as (sender, receiver):
        assert sender.neighbours.transport == receiver.neighbours.transport == chosen
        agree(sender, receiver)


def test_ipc_without_peer_access_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="--activation-transport ipc: GPU 0 of stage 0 and GPU 1"),
        pair(tmp_path, config_of((0, 1), "ipc")),
    ):
        pass


def test_ends_that_decide_differently_refuse_each_other(tmp_path: Path) -> None:
    with (
        pair(tmp_path, config_of(transport="shm"), config_of(transport="ipc")) as (one, other),
        pytest.raises(ConfigError, match="transport is shm there and ipc here"),
    ):
        agree(one, other)


def test_one_number_for_two_gpus_is_refused(tmp_path: Path) -> None:
    with (
        pair(tmp_path, config_of(), visible=(1, 0), peers=((0, 1),)) as (sender, receiver),
        pytest.raises(ConfigError, match="start all stages with one CUDA_VISIBLE_DEVICES"),
    ):
        agree(sender, receiver)
