"""The core, one behaviour at a time. `test_core_model.py` tests them together."""

import pytest

from pipemax.kv_daemon.core import KvCore
from pipemax.kv_daemon.events import (
    ContradictionError,
    FromStage,
    LayOutHost,
    MapPool,
    NewCoordinator,
    PoolMapped,
    Run,
    SendToCoordinator,
    SendToStage,
    StartCopy,
)
from pipemax.kv_daemon.transfers import unmerged
from pipemax.proto.errors import PipemaxSystemError
from pipemax.proto.messages.control import (
    BlockMove,
    Drop,
    Prefetch,
    Release,
    Released,
    Reset,
    ResetDone,
    Store,
    Stored,
)
from pipemax.proto.messages.kv import Computed, PoolAttached
from support.kv_core import BLOCK_BYTES, NUM_DEVICE, Daemon, copies, loaded, offer, told

# Copies.


def test_neighbours_on_both_sides_become_one_copy() -> None:
    daemon = Daemon()
    runs = daemon.stored([(0, index, 40 + index) for index in range(5)])
    assert runs == [Run(0, 40, 5)]
    daemon.prefetch(0, [(0, 3, 13), (0, 0, 10), (0, 1, 11), (0, 4, 20), (0, 2, 12)])
    (copy,) = copies(daemon.take())
    assert copy.runs == (Run(0, 10, 4), Run(4, 20, 1))


def test_without_merging_each_block_is_a_copy() -> None:
    daemon = Daemon(merge_runs=unmerged)
    assert len(daemon.stored([(0, index, 40 + index) for index in range(5)])) == 5


def test_neighbours_on_one_side_only_are_not_merged() -> None:
    daemon = Daemon()
    assert daemon.stored([(0, 0, 5), (0, 1, 4)]) == [Run(0, 5, 1), Run(1, 4, 1)]
    daemon.stored([(7, 0, 6)])
    daemon.prefetch(0, [(0, 1, 30), (7, 0, 31)])
    (copy,) = copies(daemon.take())
    assert len(copy.runs) == 2


def test_an_urgent_load_gets_in_between_the_pieces_of_another() -> None:
    daemon = Daemon(piece_blocks=2)
    daemon.stored([(0, index, index) for index in range(6)])
    daemon.prefetch(9, [(0, index, 100 + index) for index in range(6)])
    daemon.prefetch(8, [(0, 0, 200)])
    assert [copy.runs for copy in copies(daemon.take())] == [(Run(0, 100, 2),)]
    daemon.done("load")
    assert [copy.runs for copy in copies(daemon.take())] == [(Run(0, 200, 1),)]
    daemon.done("load")
    said = daemon.take()
    assert said[0] == loaded(8)
    assert [copy.runs for copy in copies(said)] == [(Run(2, 102, 2),)]


def test_as_many_copies_are_under_way_as_the_depth_says() -> None:
    daemon = Daemon(piece_blocks=2, depth=2)
    daemon.stored([(0, index, index) for index in range(6)])
    daemon.prefetch(9, [(0, index, 100 + index) for index in range(6)])
    assert [copy.runs for copy in copies(daemon.take())] == [(Run(0, 100, 2),), (Run(2, 102, 2),)]
    daemon.done("load")
    assert [copy.runs for copy in copies(daemon.take())] == [(Run(4, 104, 2),)]
    daemon.feed(Release(epoch=1, requests=(0,)))
    daemon.done("load")
    assert daemon.take() == []
    daemon.done("load")
    assert daemon.take() == [loaded(9), told(Released(epoch=1, requests=(0,)))]


def test_stores_go_in_the_order_asked_and_directions_do_not_wait_for_each_other() -> None:
    daemon = Daemon()
    daemon.stored([(0, 0, 0)])
    daemon.store([(1, 0, 1)])
    daemon.store([(2, 0, 2)])
    daemon.prefetch(3, [(0, 0, 3)])
    first = copies(daemon.take())
    assert [(copy.direction, copy.runs[0].device_block) for copy in first] == [
        ("store", 1),
        ("load", 3),
    ]
    daemon.done("store")
    assert [copy.runs[0].device_block for copy in copies(daemon.take())] == [2]


def test_copies_wait_until_the_stage_computed_the_step_before() -> None:
    daemon = Daemon(num_stages=2)
    daemon.store([(0, 0, 0)], after=5)
    daemon.computed(4, stage=0)
    assert copies(daemon.take()) == []
    daemon.computed(5, stage=1)
    assert [copy.stage for copy in copies(daemon.take())] == [1]
    daemon.computed(5, stage=0)
    assert [copy.stage for copy in copies(daemon.take())] == [0]


def test_a_gated_job_holds_nobody_up() -> None:
    daemon = Daemon()
    daemon.stored([(0, 0, 0)])
    daemon.prefetch(4, [(0, 0, 1)], after=2)
    daemon.prefetch(5, [(0, 0, 2)])
    assert [copy.runs[0].device_block for copy in copies(daemon.take())] == [2]


def test_a_load_waits_for_the_store_of_its_block_stage_by_stage() -> None:
    daemon = Daemon(num_stages=2)
    daemon.store([(0, 0, 0), (0, 1, 1)])
    daemon.prefetch(3, [(0, 0, 10), (0, 1, 11)])
    assert [copy.direction for copy in copies(daemon.take())] == ["store", "store"]
    daemon.done("store", stage=1)
    assert copies(daemon.take()) == [StartCopy(1, "load", (Run(0, 10, 2),))]
    daemon.done("load", stage=1)
    assert daemon.take() == [loaded(3, stage=1)]


# Answers.


def test_a_store_is_answered_in_one_message_when_all_stages_have_it() -> None:
    daemon = Daemon(num_stages=2)
    daemon.store([(0, 0, 0), (4, 0, 1)])
    daemon.take()
    daemon.done("store", stage=0)
    assert daemon.take() == []
    daemon.done("store", stage=1)
    assert daemon.take() == [told(Stored(epoch=1, requests=(0, 4), indices=(0, 0)))]


def test_storing_again_is_answered_at_once_when_stored_and_once_while_under_way() -> None:
    daemon = Daemon()
    daemon.store([(0, 0, 0)])
    daemon.take()
    daemon.store([(0, 0, 0)])
    assert daemon.take() == []
    answer = told(Stored(epoch=1, requests=(0,), indices=(0,)))
    daemon.done("store")
    assert daemon.take() == [answer]
    daemon.store([(0, 0, 0)])
    assert daemon.take() == [answer]


def test_an_empty_prefetch_is_loaded_at_once() -> None:
    daemon = Daemon(num_stages=2)
    daemon.prefetch(7, [], after=6)
    assert daemon.take() == [loaded(7, 0), loaded(7, 1)]


def test_a_release_waits_for_copies_and_lets_the_step_be_loaded() -> None:
    daemon = Daemon(piece_blocks=1)
    daemon.stored([(0, 0, 0), (0, 1, 1), (5, 0, 2)])
    daemon.prefetch(3, [(0, 0, 10), (0, 1, 11), (5, 0, 12)])
    daemon.take()
    daemon.feed(Release(epoch=1, requests=(0, 5, 77, 77)))
    assert daemon.take() == [told(Released(epoch=1, requests=(5, 77)))]
    assert daemon.core.host_blocks_used == 1
    daemon.done("load")
    assert daemon.take() == [loaded(3), told(Released(epoch=1, requests=(0,)))]
    assert daemon.core.host_blocks_used == 0


def test_a_release_may_keep_the_first_blocks() -> None:
    daemon = Daemon(piece_blocks=1)
    daemon.stored([(0, index, index) for index in range(4)])
    daemon.feed(Release(epoch=1, requests=(0,), first_indices=(2,)))
    assert daemon.take() == [told(Released(epoch=1, requests=(0,)))]
    assert daemon.core.host_blocks_used == 2
    daemon.prefetch(1, [(0, 0, 8), (0, 1, 9)])
    with pytest.raises(ContradictionError, match="block 2 of request 0"):
        daemon.prefetch(2, [(0, 2, 9)])


def test_every_release_of_a_request_is_answered_once_nothing_of_it_is_copied() -> None:
    daemon = Daemon(piece_blocks=1)
    daemon.stored([(0, index, index) for index in range(3)])
    daemon.prefetch(3, [(0, 1, 10), (0, 2, 11)])
    daemon.take()
    daemon.feed(Release(epoch=1, requests=(0,), first_indices=(1,)))
    daemon.feed(Release(epoch=1, requests=(0,), first_indices=(0,)))
    assert daemon.take() == []
    daemon.done("load")
    assert daemon.take() == [loaded(3), told(Released(epoch=1, requests=(0, 0)))]
    assert daemon.core.host_blocks_used == 0


def test_a_release_names_a_first_block_for_each_request_or_for_none() -> None:
    daemon = Daemon()
    with pytest.raises(ContradictionError, match="2 requests and 1 first"):
        daemon.feed(Release(epoch=1, requests=(0, 1), first_indices=(1,)))


def test_a_load_that_waits_for_a_dropped_store_is_cancelled() -> None:
    daemon = Daemon()
    daemon.store([(0, 0, 0)], after=2)
    daemon.prefetch(3, [(0, 0, 10)])
    daemon.take()
    daemon.feed(Drop(epoch=1, request=0, first_index=0))
    assert daemon.take() == [loaded(3)]


def test_drop_keeps_what_is_below_the_index() -> None:
    daemon = Daemon()
    daemon.stored([(0, index, index) for index in range(4)])
    daemon.feed(Drop(epoch=1, request=0, first_index=3))
    daemon.prefetch(1, [(0, 2, 9)])
    with pytest.raises(ContradictionError, match="block 3 of request 0"):
        daemon.prefetch(2, [(0, 3, 9)])


# Room.


def test_a_store_waits_for_a_host_block_that_is_draining() -> None:
    daemon = Daemon(host_blocks=1)
    daemon.store([(0, 0, 0)])
    daemon.feed(Drop(epoch=1, request=0, first_index=0))
    daemon.store([(1, 0, 1)])
    assert len(copies(daemon.take())) == 1
    daemon.done("store")
    assert [copy.runs for copy in copies(daemon.take())] == [(Run(0, 1, 1),)]
    daemon.done("store")
    assert daemon.take() == [told(Stored(epoch=1, requests=(1,), indices=(0,)))]


def test_a_store_that_waits_can_be_dropped() -> None:
    daemon = Daemon(host_blocks=1)
    daemon.store([(0, 0, 0)])
    daemon.feed(Drop(epoch=1, request=0, first_index=0))
    daemon.store([(1, 0, 1)])
    daemon.take()
    daemon.feed(Release(epoch=1, requests=(1,)))
    assert daemon.take() == [told(Released(epoch=1, requests=(1,)))]
    daemon.done("store")
    assert daemon.take() == []
    assert daemon.core.host_blocks_used == 0


def test_more_than_the_host_holds_is_a_contradiction() -> None:
    daemon = Daemon(host_blocks=2)
    with pytest.raises(ContradictionError, match="all 2 host blocks are taken"):
        daemon.store([(0, 0, 0), (0, 1, 1), (0, 2, 2)])


def test_a_device_block_beyond_the_pool_is_a_contradiction() -> None:
    daemon = Daemon()
    with pytest.raises(ContradictionError, match="device block 1000 of 1000"):
        daemon.store([(0, 0, NUM_DEVICE)])


def test_no_host_memory_works() -> None:
    core = KvCore(1, 0)
    core.handle(Reset(epoch=0), 0.0)
    core.handle(FromStage(0, offer(0, 0)), 0.0)
    said = core.handle(PoolMapped(offer(0, 0)), 0.0)
    assert said == [
        SendToStage(0, PoolAttached(epoch=0)),
        LayOutHost(0, (BLOCK_BYTES,)),
        told(ResetDone(epoch=0, num_host_blocks=0)),
    ]
    assert core.handle(Release(epoch=0, requests=(3,)), 0.0) == [
        told(Released(epoch=0, requests=(3,)))
    ]


def test_queued_load_bytes_count_what_is_not_copied() -> None:
    daemon = Daemon(num_stages=2, piece_blocks=1)
    daemon.store([(0, 0, 0), (0, 1, 1)])
    for stage in (0, 0, 1, 1):
        daemon.done("store", stage=stage)
    daemon.prefetch(1, [(0, 0, 5), (0, 1, 6)])
    assert daemon.core.queued_load_bytes() == (200, 200)
    daemon.done("load", stage=1)
    assert daemon.core.queued_load_bytes() == (200, 100)


# Epochs.


def test_a_reset_is_done_when_all_attached_and_no_old_copy_runs() -> None:
    daemon = Daemon(num_stages=2)
    daemon.stored([(9, 0, 9)])
    daemon.done("store", stage=1)
    daemon.store([(0, 0, 0)])
    daemon.take()
    said = daemon.begin(2)
    assert not any(isinstance(command, SendToCoordinator) for command in said)
    daemon.done("store", stage=0)
    assert daemon.take() == []
    daemon.done("store", stage=1)
    assert daemon.take() == [told(ResetDone(epoch=2, num_host_blocks=100))]
    assert daemon.core.host_blocks_used == 1
    daemon.prefetch(0, [(9, 0, 1)])
    with pytest.raises(ContradictionError):
        daemon.prefetch(1, [(0, 0, 1)])


def test_an_offer_of_a_newer_epoch_is_a_reset_and_the_reset_may_still_drop_the_blocks() -> None:
    daemon = Daemon()
    daemon.stored([(0, 0, 0)])
    daemon.attach(0, epoch=2)
    assert daemon.take() == [MapPool(offer(0, 2)), SendToStage(0, PoolAttached(epoch=2))]
    assert daemon.core.host_blocks_used == 1
    daemon.feed(Reset(epoch=2, keep_host_blocks=False))
    assert daemon.take() == [told(ResetDone(epoch=2, num_host_blocks=100))]
    assert daemon.core.host_blocks_used == 0
    daemon.feed(Reset(epoch=2))
    assert daemon.take() == []


def test_messages_of_other_epochs_are_void() -> None:
    daemon = Daemon()
    daemon.begin(5)
    daemon.feed(Store(epoch=4, after=-1, blocks=(BlockMove(0, 0, 0),)))
    daemon.feed(Prefetch(epoch=6, step=1, after=-1, blocks=(BlockMove(0, 0, 0),)))
    daemon.feed(Release(epoch=4, requests=(1,)))
    daemon.feed(Drop(epoch=4, request=1, first_index=0))
    daemon.feed(Reset(epoch=4))
    daemon.feed(FromStage(0, Computed(epoch=4, step=9)))
    daemon.feed(FromStage(0, offer(0, 4)))
    daemon.feed(PoolMapped(offer(0, 4)))
    assert daemon.take() == []
    assert daemon.core.stages[0].computed == -1


def test_a_stage_that_comes_back_with_other_blocks_is_refused() -> None:
    daemon = Daemon()
    daemon.feed(Reset(epoch=2))
    with pytest.raises(PipemaxSystemError, match="blocks of 7 bytes instead of 100"):
        daemon.attach(0, epoch=2, block_bytes=7)


def test_a_new_coordinator_finds_an_empty_host_and_counts_epochs_anew() -> None:
    daemon = Daemon()
    daemon.begin(7)
    daemon.stored([(0, 0, 0)])
    daemon.store([(0, 1, 1)])
    daemon.feed(NewCoordinator())
    assert daemon.core.host_blocks_used == 1  # the one under copy
    assert told(ResetDone(epoch=1, num_host_blocks=100)) not in daemon.begin(1)
    daemon.done("store")
    assert daemon.take() == [told(ResetDone(epoch=1, num_host_blocks=100))]
    assert daemon.core.host_blocks_used == 0
