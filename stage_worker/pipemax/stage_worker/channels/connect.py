"""Opens the channels of a stage as the configuration says."""

from dataclasses import dataclass
from pathlib import Path

import zmq

from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.registry import ACTIVATIONS, LOGITS
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import (
    bind_router,
    connect_dealer,
    identity_of,
    make_dealer,
    make_router,
)
from pipemax.stage_worker.channels.logits import LogitsPlace, LogitsSender
from pipemax.stage_worker.channels.receiver import ActivationReceiver
from pipemax.stage_worker.channels.ring import RingMemory, RingShape
from pipemax.stage_worker.channels.sender import ActivationSender
from pipemax.stage_worker.channels.tcp import TcpReader, TcpWriter

Context = zmq.Context[zmq.Socket[bytes]]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A stage's channels. The first stage has no `previous`, the last one no `next`, and only the
    last one may have `samplers`."""

    previous: ActivationReceiver | None = None
    next: ActivationSender | None = None
    samplers: LogitsSender | None = None

    @property
    def transport(self) -> str:
        """`ipc`, `shm`, `tcp`, or `none` for a stage without neighbours. Both, in order, where one
        takes its rows by another transport than it gives them."""
        ends = [channel.transport for channel in (self.previous, self.next) if channel is not None]
        return ", ".join(dict.fromkeys(ends)) or "none"

    @property
    def agreed(self) -> bool:
        """Every channel is agreed on for the present epoch."""
        return all(end.agreed for end in self._ends)

    def reset(self, epoch: int) -> None:
        for channel in self._ends:
            channel.reset(epoch)

    def offer(self) -> None:
        """Offers the rings to the next stage and to samplers, unless they have accepted already."""
        for end in (self.next, self.samplers):
            if end is not None and not end.agreed:
                end.offer()

    def close(self) -> None:
        for channel in self._ends:
            channel.close()

    @property
    def _ends(self) -> list[ActivationReceiver | ActivationSender | LogitsSender]:
        return [end for end in (self.previous, self.next, self.samplers) if end is not None]


def open_neighbours(
    context: Context,
    config: EngineConfig,
    run_dir: Path,
    *,
    stage: int,
    memory: RingMemory,
    shape: RingShape,
    logits: LogitsPlace | None = None,
) -> Neighbours:
    """`logits`: where the last stage leaves them for samplers. Raises ConfigError for TCP without
    keys or on an address that is not ours, and for a transport that this device cannot offer."""
    connect = _Connect(context, config, run_dir, stage, memory, shape)
    is_first, is_last = stage == 0, stage == config.pipeline_parallel_size - 1
    previous = None if is_first else connect.receiver()
    try:
        return Neighbours(
            previous,
            None if is_last else connect.sender(),
            None if logits is None else connect.samplers(logits),
        )
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

    def samplers(self, place: LogitsPlace) -> LogitsSender:
        identity = identity_of("stage", self.stage)
        endpoints = [
            socket_endpoint(self.run_dir, f"logits-{i}") for i in range(self.config.sampler_workers)
        ]
        return LogitsSender(
            [connect_dealer(self.context, end, LOGITS, identity) for end in endpoints], place
        )

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
