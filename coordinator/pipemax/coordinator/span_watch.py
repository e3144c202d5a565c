"""Who watches spans. Stages and daemon record only while somebody does.

What they are told is a lease that is renewed: a process that starts meanwhile learns of it within a
second, and when nobody watches any more, all stop by themselves.
"""

from collections.abc import Callable

from pipemax.coordinator.live_spans import LiveSpans
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.spans import CopySpans, RecordSpans, StageSpans, WatchedSpans
from pipemax.proto.messages.types import Message

LEASE_S = 3.0
RENEW_S = 1.0
LINGER_S = 1.5
"""So long after the time that a client asked for, what was recorded in it still arrives."""
MOST_WATCHERS = 8
"""Clients. Each report is sent to each of them."""


class SpanWatch:
    """`tell_all` sends to all stages and the daemon; `send` to a client, and raises BlockingIOError
    or ConnectionError when it cannot be done at once."""

    def __init__(
        self,
        tell_all: Callable[[Message], None],
        send: Callable[[bytes, Message], None],
        live: LiveSpans,
    ) -> None:
        self._tell_all = tell_all
        self._send = send
        self._live = live
        self._until_s: dict[bytes, float] = {}
        self._renew_at_s = 0.0

    def watch(self, client: bytes, seconds: float, now_s: float) -> None:
        """Raises RequestError when there are too many already."""
        if len(self._until_s) >= MOST_WATCHERS and client not in self._until_s:
            raise RequestError(
                "too_many", f"{MOST_WATCHERS} clients record already; wait until one has ended"
            )
        self._until_s[client] = now_s + seconds

    def tick(self, now_s: float) -> None:
        """Renews the lease when it is time."""
        for client in [c for c, until_s in self._until_s.items() if now_s > until_s + LINGER_S]:
            del self._until_s[client]
        wanted = self._live.is_wanted or any(until_s > now_s for until_s in self._until_s.values())
        if wanted and now_s >= self._renew_at_s:
            self._renew_at_s = now_s + RENEW_S
            self._tell_all(RecordSpans(seconds=LEASE_S))

    def report(self, spans: StageSpans | CopySpans) -> None:
        """Passes it on. A client that cannot take it loses it."""
        self._live.keep(spans)
        if not self._until_s:
            return
        message = WatchedSpans(spans=spans)
        for client in list(self._until_s):
            try:
                self._send(client, message)
            except BlockingIOError:
                pass
            except ConnectionError:
                del self._until_s[client]
