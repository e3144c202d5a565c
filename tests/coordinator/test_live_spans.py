"""The last seconds of spans: kept while somebody looks, within bounds."""

from pipemax.coordinator.live_spans import MOST_BYTES, WANTED_S, WINDOW_S, LiveSpans
from pipemax.proto.messages.spans import CopySpans, StageSpans


class World:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.live = LiveSpans(lambda: self.now_s)

    def report(self, spans: int = 1) -> None:
        self.live.keep(
            StageSpans(
                stage=0,
                pid=1,
                begin_ns=0,
                states=bytes(spans),
                lengths_ns=b"",
                steps=b"",
                total_ns=(),
            )
        )


def test_nothing_is_kept_until_somebody_looks_nor_long_after() -> None:
    world = World()
    assert not world.live.is_wanted
    world.report()
    assert world.live.after(0) == ()
    assert world.live.is_wanted
    world.report()
    world.report()
    (first, _), (second, _) = world.live.after(0)
    assert [number for number, _ in world.live.after(first)] == [second]
    assert world.live.after(second) == ()
    world.now_s += WANTED_S + 0.1
    assert not world.live.is_wanted
    world.report()
    assert world.live.after(0) == ()


def test_what_is_old_or_too_much_goes_first() -> None:
    world = World()
    for _ in range(100):
        world.live.after(0)
        world.report()
        world.now_s += 1.0
    assert WINDOW_S - 1 <= len(world.live.after(0)) <= WINDOW_S + 1
    for _ in range(1000):
        world.report(spans=16384)
    kept = world.live.after(0)
    assert 0 < len(kept) * 16384 * 17 <= MOST_BYTES
    assert kept[-1][0] - kept[0][0] == len(kept) - 1  # the newest, without gaps


def test_copies_are_not_for_the_page() -> None:
    world = World()
    world.live.after(0)
    empty = CopySpans(stages=b"", directions=b"", begins_ns=b"", lengths_ns=b"", sizes_bytes=b"")
    world.live.keep(empty)
    assert world.live.after(0) == ()
