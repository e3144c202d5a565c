"""TCP sockets that only known peers can talk to: CURVE encrypts and proves who holds which key
(CurveZMQ, ZeroMQ RFC 26), a ZAP handler says whose key is let in (RFC 27).

CURVE alone lets anybody in who knows the server's public key, so nothing here listens without a
`Gate`.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq
from zmq.auth.thread import ThreadAuthenticator

log = logging.getLogger(__name__)

OVERHEAD_BYTES = 64
"""What encryption adds to a message at most; the limit of a socket counts it."""
_TELL_EVERY_S = 60.0
"""Peers that are turned away are told of at most so often: they must not fill our disk."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Z85 text, 40 characters each."""

    public: str
    secret: str = field(repr=False)


def make_key_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def use_keys(socket: "zmq.Socket[bytes]", own: KeyPair, server_public: str) -> None:
    """Makes a socket that is to connect prove `own`, and talk to nobody but the holder of the
    server's key. Before it connects."""
    socket.curve_serverkey = server_public.encode()
    socket.curve_publickey = own.public.encode()
    socket.curve_secretkey = own.secret.encode()
    _make_room(socket)


class Gate:
    """Asks `admits(public_key)`, in a thread of its own, about each peer that connects to the
    sockets it guards. One for a context: ZeroMQ has one place for it."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        domain: str,
        admits: Callable[[str], bool],
    ) -> None:
        self._domain = domain
        self._admits = admits
        self._told_at: float | None = None
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain=domain, credentials_provider=self)

    def guard(self, socket: "zmq.Socket[bytes]", own: KeyPair) -> None:
        """Lets only admitted keys in, none if this gate is closed. Before the socket is bound."""
        socket.zap_domain = self._domain.encode()
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.curve_server = True
        socket.curve_publickey = own.public.encode()
        socket.curve_secretkey = own.secret.encode()
        _make_room(socket)

    def callback(self, domain: str, key: bytes) -> bool:
        """The name under which zmq.auth calls it, once for each handshake."""
        try:
            admitted = self._admits(key.decode())
        except Exception:  # the thread must live: without it nobody could connect any more
            log.exception("a key could not be looked up; its holder is turned away")
            return False
        if not admitted:
            self._tell(key)
        return admitted

    def close(self) -> None:
        """Before the context ends; safe to call twice."""
        self._authenticator.stop()

    def _tell(self, key: bytes) -> None:
        now = time.monotonic()
        if self._told_at is None or now - self._told_at >= _TELL_EVERY_S:
            self._told_at = now
            log.warning(
                "a peer with the public key %s was turned away from %s; told once in %.0f s",
                key.decode(),
                self._domain,
                _TELL_EVERY_S,
            )


def _make_room(socket: "zmq.Socket[bytes]") -> None:
    limit = socket.getsockopt(zmq.MAXMSGSIZE)
    assert isinstance(limit, int)
    if limit >= 0:
        socket.setsockopt(zmq.MAXMSGSIZE, limit + OVERHEAD_BYTES)
