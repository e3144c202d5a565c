"""Opens the channels of a stage as the configuration says."""

from dataclasses import dataclass
from pathlib import Path

import zmq

from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.registry import ACTIVATIONS
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import (
    bind_router,
    connect_dealer,
    identity_of,
    make_dealer,
    make_router,
)
from pipemax.stage_worker.channels.receiver import ActivationReceiver
from pipemax.stage_worker.channels.ring import RingMemory, RingShape
from pipemax.stage_worker.channels.sender import ActivationSender
from pipemax.stage_worker.channels.tcp import TcpReader, TcpWriter

Context = zmq.Context[zmq.Socket[bytes]]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A stage's channels. The first stage has no `previous`, the last one no `next`."""

    previous: ActivationReceiver | None = None
    next: ActivationSender | None = None

    @property
    def transport(self) -> str:
        """`ipc`, `shm`, `tcp`, or `none` for a stage without neighbours. Both, in order, where one
        takes its rows by another transport than it gives them."""
        ends = [channel.transport for channel in (self.previous, self.next) if channel is not None]
        return ", ".join(dict.fromkeys(ends)) or "none"

    @property
    def agreed(self) -> bool:
        """Every channel is agreed on for the present epoch."""
        return all(end.agreed for end in (self.previous, self.next) if end is not None)

    def reset(self, epoch: int) -> None:
        for channel in (self.previous, self.next):
            if channel is not None:
                channel.reset(epoch)

    def offer(self) -> None:
        """Offers the ring to the next stage, unless it has accepted it already."""
        if self.next is not None and not self.next.agreed:
            self.next.offer()

    def close(self) -> None:
        for channel in (self.previous, self.next):
            if channel is not None:
                channel.close()


def open_neighbours(
    context: Context,
    config: EngineConfig,
    run_dir: Path,
    *,
    stage: int,
    memory: RingMemory,
    shape: RingShape,
) -> Neighbours:
    """Raises ConfigError for TCP without keys or on an address that is not ours, and for a
    transport that this device cannot offer."""
    connect = _Connect(context, config, run_dir, stage, memory, shape)
    is_first, is_last = stage == 0, stage == config.pipeline_parallel_size - 1
    previous = None if is_first else connect.receiver()
    try:
        return Neighbours(previous, None if is_last else connect.sender())
    except BaseException:
        if previous is not None:
            previous.close()
        raise


@dataclass(frozen=True, slots=True)
class _Connect:
    context: Context
    config: EngineConfig
    run_dir: Path
    stage: int
    memory: RingMemory
    shape: RingShape

    def sender(self) -> ActivationSender:
        identity = identity_of("stage", self.stage)
        transport = self.memory.transport(self.config.activation_transport, self.stage)
        if transport == "tcp":
            writer = TcpWriter(self.run_dir, self.stage + 1, self.memory)
            socket = make_dealer(self.context, ACTIVATIONS, identity)
            writer.secure(socket)
            return ActivationSender(socket, writer, self.shape)
        endpoint = socket_endpoint(self.run_dir, f"act-{self.stage + 1}")
        socket = connect_dealer(self.context, endpoint, ACTIVATIONS, identity)
        return ActivationSender(socket, self.memory.row_writer(transport, self.shape), self.shape)

    def receiver(self) -> ActivationReceiver:
        peer = identity_of("stage", self.stage - 1)
        transport = self.memory.transport(self.config.activation_transport, self.stage - 1)
        if transport == "tcp":
            host = self.config.activation_host
            listener = TcpReader(self.run_dir, self.stage, host, self.memory, self.shape)
            socket = make_router(self.context, ACTIVATIONS)
            listener.listen(self.context, socket)
            return ActivationReceiver(socket, peer, listener, self.shape)
        endpoint = socket_endpoint(self.run_dir, f"act-{self.stage}")
        socket = bind_router(self.context, endpoint, ACTIVATIONS)
        reader = self.memory.row_reader(transport, self.shape)
        return ActivationReceiver(socket, peer, reader, self.shape)
