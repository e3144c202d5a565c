"""Who watches, and what stages are told of it."""

import pytest

from pipemax.coordinator.live_spans import LiveSpans
from pipemax.coordinator.span_watch import LEASE_S, LINGER_S, MOST_WATCHERS, RENEW_S, SpanWatch
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.spans import CopySpans, RecordSpans, WatchedSpans
from pipemax.proto.messages.types import Message

REPORT = CopySpans(stages=b"", directions=b"", begins_ns=b"", lengths_ns=b"", sizes_bytes=b"")


class World:
    def __init__(self) -> None:
        self.told: list[Message] = []
        self.sent: list[tuple[bytes, Message]] = []
        self.failing: dict[bytes, Exception] = {}
        self.live = LiveSpans(lambda: 0.0)
        self.watch = SpanWatch(self.told.append, self._send, self.live)

    def _send(self, client: bytes, message: Message) -> None:
        if client in self.failing:
            raise self.failing[client]
        self.sent.append((client, message))

    def clients_of_a_report(self) -> list[bytes]:
        self.sent.clear()
        self.watch.report(REPORT)
        assert all(message == WatchedSpans(spans=REPORT) for _, message in self.sent)
        return [client for client, _ in self.sent]


def test_a_lease_is_renewed_while_somebody_watches_and_then_ends() -> None:
    world = World()
    world.watch.tick(0.0)
    assert world.told == []
    world.watch.watch(b"a", 2.5, 0.0)
    times = [n / 10 for n in range(100)]
    told_at = []
    for now in times:
        world.watch.tick(now)
        if len(world.told) > len(told_at):
            told_at.append(now)
    assert told_at == [0.0, 1.0, 2.0]
    assert RENEW_S < LEASE_S / 2
    assert set(world.told) == {RecordSpans(seconds=LEASE_S)}


def test_reports_go_to_those_who_watch_and_a_little_longer() -> None:
    world = World()
    assert world.clients_of_a_report() == []
    world.watch.watch(b"a", 1.0, 0.0)
    world.watch.watch(b"b", 9.0, 0.0)
    assert world.clients_of_a_report() == [b"a", b"b"]
    world.watch.tick(1.0 + LINGER_S / 2)
    assert world.clients_of_a_report() == [b"a", b"b"]
    world.watch.tick(1.1 + LINGER_S)
    assert world.clients_of_a_report() == [b"b"]


def test_one_that_is_slow_misses_a_report_and_one_that_is_gone_is_forgotten() -> None:
    world = World()
    for client in (b"a", b"b", b"c"):
        world.watch.watch(client, 9.0, 0.0)
    world.failing = {b"a": BlockingIOError(), b"b": ConnectionError()}
    assert world.clients_of_a_report() == [b"c"]
    world.failing = {}
    assert world.clients_of_a_report() == [b"a", b"c"]


def test_few_may_watch() -> None:
    world = World()
    for number in range(MOST_WATCHERS):
        world.watch.watch(b"%d" % number, 5.0, 0.0)
    with pytest.raises(RequestError, match="clients record already"):
        world.watch.watch(b"more", 5.0, 0.0)
    world.watch.watch(b"0", 9.0, 1.0)


def test_the_page_watches_too() -> None:
    world = World()
    world.live.after(0)  # the built-in page looks
    world.watch.tick(0.0)
    assert world.told == [RecordSpans(seconds=LEASE_S)]
    assert world.clients_of_a_report() == []
