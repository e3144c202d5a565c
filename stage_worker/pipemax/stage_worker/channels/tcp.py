"""Activations as TCP frames, encrypted and authenticated with CURVE (CurveZMQ, RFC 26).

The receiver binds a free port and writes the endpoint to the run directory. Rows travel as the
second frame of ActivationReady, from the sender's tensor into the receiver's slot.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import zmq

from pipemax.proto.curve import Gate, use_keys
from pipemax.proto.errors import ConfigError, WireError
from pipemax.proto.key_files import replace_file
from pipemax.proto.messages.activations import ActivationReady, RingOffer
from pipemax.stage_worker.channels.keys import endpoint_file, load_activation_keys
from pipemax.stage_worker.channels.ring import RingMemory, RingPlace, RingShape, Rows, Written

_ZAP_DOMAIN = "pipemax-activations"


class TcpWriter:
    """Sends rows from where they are, if they lie one after the other."""

    transport: Final = "tcp"

    def __init__(self, run_dir: Path, receiver_stage: int, memory: RingMemory) -> None:
        self._memory = memory
        self._keys = load_activation_keys(run_dir)
        self._endpoint_file = endpoint_file(run_dir, receiver_stage)
        self._endpoint: str | None = None

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """Sets the keys; before the first `reconnect`."""
        use_keys(socket, self._keys.sender, self._keys.receiver_public)

    def place(self) -> RingPlace:
        return RingPlace()

    def write(self, slot: int, rows: Rows) -> Written:
        return Written((self._memory.frame(rows),))

    def reconnect(self, socket: zmq.Socket[bytes]) -> None:
        """A receiver that was started again listens on another port."""
        try:
            endpoint = self._endpoint_file.read_text()
        except FileNotFoundError:
            return
        if endpoint == self._endpoint:
            return
        if self._endpoint is not None:
            socket.disconnect(self._endpoint)
        socket.connect(endpoint)
        self._endpoint = endpoint

    def close(self) -> None: ...


class TcpReader:
    """Receives rows into fixed buffers, one per slot, agreed once."""

    transport: Final = "tcp"

    def __init__(
        self, run_dir: Path, stage: int, host: str, memory: RingMemory, shape: RingShape
    ) -> None:
        self._keys = load_activation_keys(run_dir)
        self._endpoint_file = endpoint_file(run_dir, stage)
        self._host = host
        self._shape = shape
        self._gate: Gate | None = None
        self._ring = memory.allocate_ring(shape)

    def listen(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
        """Binds `socket`, admitting only this run's sender, and says where. Raises ConfigError
        when the host's address is not ours."""
        self._gate = Gate(context, _ZAP_DOMAIN, self._keys.sender_public.__eq__)
        self._gate.guard(socket, self._keys.receiver)
        try:
            port = socket.bind_to_random_port(f"tcp://{self._host}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"cannot listen for activations on {self._host} ({error}); "
                "activation_host must be an address of this machine"
            ) from error
        replace_file(self._endpoint_file, f"tcp://{self._host}:{port}".encode())

    def attach(self, offer: RingOffer) -> None:
        if offer.handle is not None:
            raise WireError("invalid_field", "ring_offer: tcp has no handle")

    def read(self, ready: ActivationReady, extra: Sequence[zmq.Frame]) -> Rows:
        expected = ready.rows * self._shape.row_bytes
        if len(extra) != 1 or len(extra[0]) != expected:
            sizes = [len(frame) for frame in extra]
            raise WireError("frames", f"step {ready.step}: {expected} bytes of rows, not {sizes}")
        self._ring.frame(ready.slot, ready.rows)[:] = extra[0].buffer
        return self._ring.read(ready.slot, ready.rows)

    def close(self) -> None:
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        self._ring.close()
