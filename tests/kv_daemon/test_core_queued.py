"""The core where `computed` and `loaded` say that something is queued: events instead of ends."""

import pytest

from pipemax.kv_daemon.core import KvCore
from pipemax.kv_daemon.events import (
    Command,
    ContradictionError,
    CopyDone,
    Event,
    FromStage,
    MapPool,
    PoolMapped,
    SendToStage,
    StartCopy,
)
from pipemax.kv_daemon.stage_link import KEPT_EVENTS, MAX_PIECE_BLOCKS
from pipemax.proto.messages.control import BlockMove, Drop, Prefetch, Reset, Store
from pipemax.proto.messages.kv import AttachPool, Computed, Loaded, PoolAttached

BLOCK = 1024


class Daemon:
    """One stage, attached for epoch 1."""

    def __init__(self, piece_blocks: int = 2, depth: int = 2, num_blocks: int = 1000) -> None:
        self.core = KvCore(
            1, num_blocks * BLOCK, piece_blocks * BLOCK, depth, orders_computing=True
        )
        self.num_blocks = num_blocks
        self.said: list[Command] = []
        self.feed(Reset(epoch=1))
        self.attach(1, "a")
        self.said.clear()

    def attach(self, epoch: int, incarnation: str) -> None:
        offer = AttachPool(
            epoch=epoch,
            stage=0,
            incarnation=incarnation,
            num_blocks=self.num_blocks,
            block_bytes=BLOCK,
        )
        self.feed(FromStage(0, offer))

    def feed(self, event: Event) -> None:
        for command in self.core.handle(event, 0.0):
            self.said.append(command)
            if isinstance(command, MapPool):
                self.feed(PoolMapped(command.offer, loaded=(b"e" * 64,)))
        self.core.check_invariants()

    def computed(self, step: int, event: int) -> None:
        self.feed(FromStage(0, Computed(epoch=self.core.epoch, step=step, event=event)))

    def stored(self, count: int) -> None:
        """Blocks 0 … of request 1, by copies that have ended."""
        moves = tuple(BlockMove(1, i, i) for i in range(count))
        self.feed(Store(epoch=1, after=-1, blocks=moves))
        while self.core.busy:
            self.feed(CopyDone(0, "store"))
        self.said.clear()

    def prefetch(self, step: int, after: int, *moves: tuple[int, int]) -> None:
        """(block of request 1, device block)"""
        blocks = tuple(BlockMove(1, index, device) for index, device in moves)
        self.feed(Prefetch(epoch=1, step=step, after=after, blocks=blocks))

    def starts(self) -> list[StartCopy]:
        return [command for command in self.said if isinstance(command, StartCopy)]

    def loaded(self) -> list[Loaded]:
        told = [command.message for command in self.said if isinstance(command, SendToStage)]
        return [message for message in told if isinstance(message, Loaded)]


def test_a_copy_names_the_event_of_its_step() -> None:
    daemon = Daemon()
    daemon.stored(4)
    for step in range(4):
        daemon.computed(step, 100 + step)
    daemon.prefetch(9, 1, (0, 10), (1, 11), (2, 12))
    daemon.prefetch(10, -1, (3, 20))
    daemon.feed(CopyDone(0, "load"))
    assert [(copy.number, copy.after) for copy in daemon.starts()] == [(0, 101), (1, 101), (2, -1)]


def test_a_copy_whose_step_is_not_queued_waits_here() -> None:
    daemon = Daemon()
    daemon.stored(1)
    daemon.prefetch(9, 5, (0, 10))
    assert not daemon.starts()
    daemon.computed(5, 42)
    assert [copy.after for copy in daemon.starts()] == [42]


def test_a_step_that_is_over_is_not_waited_for() -> None:
    daemon = Daemon()
    daemon.stored(3)
    daemon.computed(0, -1)
    daemon.prefetch(9, 0, (0, 10))
    daemon.feed(CopyDone(0, "load"))
    for step in range(1, KEPT_EVENTS + 4):
        daemon.computed(step, step)
    daemon.prefetch(50, 1, (1, 11))  # long past: the oldest event known costs nothing
    daemon.prefetch(51, KEPT_EVENTS + 3, (2, 12))
    assert [copy.after for copy in daemon.starts()] == [-1, 4, KEPT_EVENTS + 3]


def test_loaded_follows_the_order_of_the_last_piece() -> None:
    daemon = Daemon(piece_blocks=2, depth=2)
    daemon.stored(5)
    daemon.prefetch(9, -1, *((i, 10 + i) for i in range(5)))
    assert len(daemon.starts()) == 2
    assert not daemon.loaded()
    daemon.feed(CopyDone(0, "load"))
    assert isinstance(daemon.said[-2], StartCopy)
    assert daemon.said[-1] == SendToStage(0, Loaded(epoch=1, step=9, copy=2))
    daemon.feed(CopyDone(0, "load"))
    daemon.feed(CopyDone(0, "load"))
    assert len(daemon.loaded()) == 1
    assert not daemon.core.busy


def test_loads_that_are_cancelled_announce_what_was_started() -> None:
    daemon = Daemon(piece_blocks=1, depth=1)
    daemon.stored(2)
    daemon.prefetch(9, -1, (0, 10), (1, 11))
    daemon.feed(Drop(epoch=1, request=1, first_index=1))
    daemon.feed(CopyDone(0, "load"))
    assert daemon.loaded() == [Loaded(epoch=1, step=9, copy=0)]


def test_a_prefetch_of_nothing_waits_for_nothing() -> None:
    daemon = Daemon()
    daemon.stored(1)
    daemon.prefetch(8, -1)
    daemon.prefetch(9, 7, (0, 10))
    daemon.feed(Drop(epoch=1, request=1, first_index=0))
    daemon.computed(7, 70)
    assert daemon.loaded() == [Loaded(epoch=1, step=8), Loaded(epoch=1, step=9)]


def test_a_load_still_waits_until_its_block_is_really_stored() -> None:
    daemon = Daemon()
    daemon.feed(Store(epoch=1, after=-1, blocks=(BlockMove(1, 0, 0),)))
    daemon.prefetch(9, -1, (0, 10))
    assert [copy.direction for copy in daemon.starts()] == ["store"]
    assert not daemon.loaded()
    daemon.feed(CopyDone(0, "store"))
    assert daemon.loaded() == [Loaded(epoch=1, step=9, copy=0)]


def test_numbers_go_on_in_a_new_epoch_and_events_do_not() -> None:
    daemon = Daemon()
    daemon.stored(2)
    daemon.computed(3, 30)
    daemon.prefetch(9, 3, (0, 10))
    daemon.feed(CopyDone(0, "load"))
    daemon.feed(Reset(epoch=2))
    daemon.attach(2, "b")
    daemon.said.clear()
    daemon.computed(3, 1)
    daemon.feed(Prefetch(epoch=2, step=9, after=3, blocks=(BlockMove(1, 1, 5),)))
    assert [(copy.number, copy.after) for copy in daemon.starts()] == [(1, 1)]


def test_what_the_engine_answers_goes_to_the_stage() -> None:
    daemon = Daemon()
    daemon.feed(Reset(epoch=2))
    daemon.attach(2, "a")
    assert SendToStage(0, PoolAttached(epoch=2, loaded=(b"e" * 64,))) in daemon.said


def test_a_stage_cannot_come_back_in_the_same_epoch() -> None:
    daemon = Daemon()
    daemon.attach(1, "a")
    with pytest.raises(ContradictionError, match="stage 0 was started again, and epoch 1 goes on"):
        daemon.attach(1, "b")


def test_an_order_stays_small_however_small_blocks_are() -> None:
    daemon = Daemon(piece_blocks=10**6, num_blocks=MAX_PIECE_BLOCKS + 1)
    daemon.feed(
        Store(
            epoch=1,
            after=-1,
            blocks=tuple(BlockMove(1, i, i) for i in range(MAX_PIECE_BLOCKS + 1)),
        )
    )
    assert [sum(run.length for run in c.runs) for c in daemon.starts()] == [MAX_PIECE_BLOCKS, 1]
