"""Coordinator and KV daemon for tests of stages: they answer as the protocol wants and decide
nothing. The test drives them."""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import zmq

from pipemax.proto.messages.control import Hello, Reset, ResetDone, StageReady, Welcome
from pipemax.proto.messages.kv import AttachPool, PoolAttached
from pipemax.proto.messages.registry import CONTROL, KV, REPORTS
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import bind_router, identity_of
from pipemax.proto.wire import Codec, encode, single_frame

DEADLINE_S = 60.0
M = TypeVar("M", bound=Message)


class FakePeers:
    """Collects what stages say, by stage, and answers the handshakes."""

    def __init__(self, run_dir: Path, instance_id: str = "first") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = bind_router(self._context, socket_endpoint(run_dir, "control"), CONTROL)
        self._reports = bind_router(self._context, socket_endpoint(run_dir, REPORTS.name), REPORTS)
        self._kv = bind_router(self._context, socket_endpoint(run_dir, "kv"), KV)
        self._codecs = {self._control: Codec(CONTROL, at_binder=True)}
        self._codecs[self._reports] = self._codecs[self._control]
        self._codecs[self._kv] = Codec(KV, at_binder=True)
        self.instance_id = instance_id
        self.attaches_pools = True
        """Whether the daemon answers AttachPool."""
        self.said: dict[bytes, list[Message]] = defaultdict(list)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def tell(self, stage: int, message: Message) -> None:
        """As the coordinator."""
        self._send(self._control, identity_of("stage", stage), message)

    def tell_from_daemon(self, stage: int, message: Message) -> None:
        self._send(self._kv, identity_of("stage", stage), message)

    def from_stage(self, stage: int, kind: type[M]) -> list[M]:
        """Everything of one kind that a stage has said, in order."""
        return [m for m in self.said[identity_of("stage", stage)] if isinstance(m, kind)]

    def take(self, stage: int, kind: type[M]) -> M:
        """The oldest message of one kind that was not taken yet; waits for it."""
        self.until(lambda: bool(self.from_stage(stage, kind)))
        message = self.from_stage(stage, kind)[0]
        self.said[identity_of("stage", stage)].remove(message)
        return message

    def until(self, done: Callable[[], bool], again: Callable[[], object] | None = None) -> None:
        """Handles messages until `done`; `again` is called in between (every few ms)."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not done():
            if time.monotonic() > deadline_s:
                heard = {peer: [type(m).__name__ for m in ms] for peer, ms in self.said.items()}
                raise AssertionError(f"waited too long; heard {heard}")
            self.handle()
            if again is not None:
                again()

    def handle(self, timeout_ms: int = 5) -> None:
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        poller.register(self._reports, zmq.POLLIN)
        poller.register(self._kv, zmq.POLLIN)
        for socket, _ in poller.poll(timeout_ms):
            assert isinstance(socket, zmq.Socket)
            identity, *frames = socket.recv_multipart()
            message = self._codecs[socket].decode(single_frame(frames, CONTROL))
            self._answer(identity, message)
            self.said[identity].append(message)

    def bring_up(self, num_stages: int, epoch: int) -> list[StageReady]:
        """Waits until all stages are ready, resets them and waits until they have done it."""
        ready = [self.take(stage, StageReady) for stage in range(num_stages)]
        self.reset(num_stages, epoch)
        return ready

    def reset(self, num_stages: int, epoch: int) -> None:
        for stage in range(num_stages):
            self.tell(stage, Reset(epoch=epoch))
        for stage in range(num_stages):
            assert self.take(stage, ResetDone).epoch == epoch

    def _answer(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._send(self._control, identity, Welcome(instance_id=self.instance_id))
        elif isinstance(message, AttachPool) and self.attaches_pools:
            self._send(self._kv, identity, PoolAttached(epoch=message.epoch))

    def _send(self, socket: zmq.Socket[bytes], identity: bytes, message: Message) -> None:
        socket.send_multipart([identity, encode(message)])
