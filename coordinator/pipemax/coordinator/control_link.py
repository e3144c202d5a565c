"""The control sockets: what stages, samplers, the KV daemon and the launcher say, and what they are
told. Each is known by the identity that its role and index give it. Two sockets, for the sake of
what need not wake this process (see REPORTS)."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import zmq
from msgspec.structs import replace

from pipemax.coordinator.assembly import DAEMON, sampler_name, stage_name
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import WireError
from pipemax.proto.messages.control import StepPlan
from pipemax.proto.messages.registry import CONTROL, REPORTS, Channel
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import bind_router, identity_of
from pipemax.proto.wire import Codec, encode, single_frame

LAUNCHER = identity_of("launcher")
CONTROL_SLICE_S = 0.1
"""Time after which clients get their turn: a coordinator that stages keep busy still answers, and
tells how busy."""

log = logging.getLogger(__name__)
_AT_ONCE = int(zmq.NOBLOCK)
_FIRST_PART = int(zmq.NOBLOCK | zmq.SNDMORE)
"""Plain numbers: pyzmq's enumerations take as long to combine as a message takes to send."""


class ControlLink:
    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", config: EngineConfig, run_dir: Path
    ) -> None:
        self.socket = bind_router(context, socket_endpoint(run_dir, CONTROL.name), CONTROL)
        self.reports = bind_router(context, socket_endpoint(run_dir, REPORTS.name), REPORTS)
        self._codec = Codec(CONTROL, at_binder=True)
        stages, samplers = range(config.pipeline_parallel_size), range(config.sampler_workers)
        self._stages = [identity_of("stage", index) for index in stages]
        self._daemon = identity_of("kv_daemon")
        self.names = {
            **{identity: stage_name(index) for index, identity in enumerate(self._stages)},
            **{identity_of("sampler", index): sampler_name(index) for index in samplers},
            self._daemon: DAEMON,
        }
        """Of the processes that make up the system, by identity."""

    def receive(self) -> Iterator[tuple[bytes, Message]]:
        """Messages that have arrived and whose they are, for a slice of time at most. What cannot
        be read is logged and left out."""
        return self._arrived(self.socket, CONTROL)

    def receive_reports(self) -> Iterator[tuple[bytes, Message]]:
        """The same of those that nobody is woken for."""
        return self._arrived(self.reports, REPORTS)

    def _arrived(
        self, socket: "zmq.Socket[bytes]", channel: Channel
    ) -> Iterator[tuple[bytes, Message]]:
        until = time.monotonic() + CONTROL_SLICE_S
        while time.monotonic() < until:
            try:
                identity = socket.recv(_AT_ONCE)
                frame = socket.recv(_AT_ONCE, copy=False)  # parts come together
                frames = [frame.bytes]
                if frame.more:
                    frames += socket.recv_multipart(_AT_ONCE)
            except zmq.Again:
                return
            try:
                message = self._codec.decode(single_frame(frames, channel))
            except WireError as error:
                log.error("control message of %r refused: %s", identity, error)
                continue
            yield identity, message

    def to_all(self, message: Message) -> None:
        """To stages, samplers and daemon."""
        frame = encode(message)
        for identity in self.names:
            self._send(identity, frame)

    def to_stages(self, plan: StepPlan) -> None:
        """Sample rows go to the last one only."""
        *others, last = self._stages
        if others:
            # One frame that all of them share: block tables are not copied for each.
            frame = zmq.Frame(encode(replace(plan, sample=())), copy=True)
            for identity in others:
                self._send(identity, frame)
        self._send(last, encode(plan))

    def to_daemon(self, message: Message) -> None:
        self._send(self._daemon, encode(message))

    def to_launcher(self, message: Message) -> None:
        self._send(LAUNCHER, encode(message))

    def to(self, identity: bytes, message: Message) -> None:
        """To the process of this identity."""
        self._send(identity, encode(message))

    def _send(self, identity: bytes, frame: bytes | zmq.Frame) -> None:
        """A process that is gone will say Hello when it is back and be reset; until then what it
        misses is void."""
        try:
            self.socket.send(identity, _FIRST_PART)
            self.socket.send(frame, _AT_ONCE, copy=not isinstance(frame, zmq.Frame))
        except zmq.ZMQError as error:
            log.warning("message to %s is lost: %s", identity.decode(), error)
