"""Both engines for GPUs between the core and stages on simulated GPUs: real bytes, late often."""

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipemax.kv_daemon import cuda_engine, cuda_link
from pipemax.kv_daemon.cuda_engine import CopiesStuckError
from pipemax.kv_daemon.events import FromStage
from pipemax.proto.errors import ConfigError, PipemaxSystemError
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
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import create_run_dir
from pipemax.stage_worker.devices.cuda import step_ring
from support.fake_cuda import FakeMachine
from support.kv_on_gpu import KvOnGpu

BLOCK_BYTES = (3000, 5000)
"""Neither page nor chunk holds a whole number of them."""
NUM_HOST, NUM_DEVICE = 24, 16
BOTH = pytest.mark.parametrize("copies", ["stage", "daemon"])
OpenRig = Callable[..., KvOnGpu]


@pytest.fixture
def open_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenRig]:
    rigs: list[KvOnGpu] = []

    def make(copies: str, *, delay_s: float = 0.001, seed: int = 0, **settings: Any) -> KvOnGpu:
        machine = FakeMachine(delay_s=delay_s, seed=seed).at(tmp_path / f"gpus-{len(rigs)}")
        given: dict[str, Any] = {
            "block_bytes": BLOCK_BYTES,
            "num_host": NUM_HOST,
            "num_device": NUM_DEVICE,
        }
        rig = KvOnGpu(copies, machine, create_run_dir("kv"), monkeypatch, **(given | settings))
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.close()


def begin(rig: KvOnGpu, epoch: int) -> None:
    rig.feed(Reset(epoch=epoch))
    for stage in rig.stages:
        stage.kv.detach()
        rig.feed(FromStage(stage.index, stage.offer(epoch)))
    done = ResetDone(epoch=epoch, num_host_blocks=rig.layout.num_blocks)
    rig.until(lambda: done in rig.told and all(stage.kv.attached for stage in rig.stages))


def answers(rig: KvOnGpu, kind: type[Message]) -> list[Any]:
    return [message for message in rig.told if isinstance(message, kind)]


def stored(rig: KvOnGpu) -> set[tuple[int, int]]:
    told = answers(rig, Stored)
    return {pair for m in told for pair in zip(m.requests, m.indices, strict=True)}


class World:
    """A lawful coordinator: requests fill blocks, which are stored, evicted and brought back for
    steps that read them. Nobody waits for a GPU: steps are queued as they are announced."""

    def __init__(self, rig: KvOnGpu, draw: random.Random) -> None:
        self.rig, self.draw = rig, draw
        self.step = -1
        self.free = list(range(NUM_DEVICE))
        self.last_use = [-1] * NUM_DEVICE
        self.tokens: dict[tuple[int, int], int] = {}
        self.on_device: dict[tuple[int, int], int] = {}
        self.request = 0

    def queue(self, reads: dict[int, int], fills: dict[int, int], *, loads: bool) -> None:
        for stage in self.rig.stages:
            if loads:
                self.rig.until(lambda s=stage: self.step in s.loaded)
            load = stage.loaded.get(self.step, -1)
            event = stage.queue_step(load, reads, fills, self.draw.choice([0.0, 0.0, 0.002]))
            self.rig.computed(stage, self.step, event)
        for block in (*reads, *fills):
            self.last_use[block] = self.step

    def fill(self) -> None:
        """A step fills new blocks, which are stored at once."""
        self.step += 1
        chosen = self.draw.sample(self.free, min(len(self.free), self.draw.randint(1, 4)))
        moves, fills = [], {}
        for index, block in enumerate(chosen):
            key = (self.request, index)
            self.free.remove(block)
            self.tokens[key] = fills[block] = (7 * len(self.tokens) + self.step) % 251
            self.on_device[key] = block
            moves.append(BlockMove(*key, block))
        self.request += 1
        store = Store(epoch=self.rig.core.epoch, after=self.step, blocks=tuple(moves))
        early = self.draw.random() < 0.5
        if early:
            self.rig.feed(store)
        self.queue({}, fills, loads=False)
        if not early:
            self.rig.feed(store)

    def evict(self) -> None:
        there = stored(self.rig)
        for key in [key for key in self.on_device if key in there]:
            if self.draw.random() < 0.7:
                self.free.append(self.on_device.pop(key))

    def bring_back(self) -> None:
        """A step reads blocks that come from the host, some of them perhaps not stored yet."""
        self.step += 1
        keys = self.draw.sample(sorted(self.tokens), min(len(self.tokens), len(self.free), 5))
        targets = self.draw.sample(self.free, len(keys))
        moves = tuple(BlockMove(*key, d) for key, d in zip(keys, targets, strict=True))
        after = max((self.last_use[d] for d in targets), default=-1)
        self.rig.feed(
            Prefetch(epoch=self.rig.core.epoch, step=self.step, after=after, blocks=moves)
        )
        reads = {d: self.tokens[key] for key, d in zip(keys, targets, strict=True)}
        self.queue(reads, {}, loads=True)

    def forget(self) -> None:
        request = self.draw.randrange(self.request)
        keys = [key for key in self.tokens if key[0] == request]
        if self.draw.random() < 0.5:
            self.rig.feed(Drop(epoch=self.rig.core.epoch, request=request, first_index=0))
        else:
            before = len(answers(self.rig, Released))
            self.rig.feed(Release(epoch=self.rig.core.epoch, requests=(request,)))
            self.rig.until(lambda: len(answers(self.rig, Released)) > before)
        for key in keys:
            del self.tokens[key]
            if key in self.on_device:
                self.free.append(self.on_device.pop(key))


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_steps_read_what_others_filled(copies: str, seed: int, open_rig: OpenRig) -> None:
    rig = open_rig(copies, seed=seed)
    begin(rig, 1)
    world = World(rig, random.Random(seed))
    for _ in range(60):
        if len(world.free) > 2 and len(world.tokens) + 4 <= NUM_HOST and world.draw.random() < 0.5:
            world.fill()
        elif len(world.tokens) > NUM_HOST - 6:
            world.forget()
        elif world.free:
            world.bring_back()
        world.evict()
        rig.turn()
    rig.until(lambda: not rig.core.busy)
    for stage in rig.stages:
        stage.runtime.synchronize(stage.compute)
        assert not stage.wrong
    for totals in rig.engine.totals():
        assert totals.load_bytes
        assert totals.store_bytes
        assert totals.load_copies
        assert totals.store_copies
        assert totals.load_seconds > 0
        assert totals.store_seconds > 0


@BOTH
def test_a_load_is_announced_before_it_is_made(copies: str, open_rig: OpenRig) -> None:
    """A step that runs long holds up neither the announcement nor anybody here."""
    rig = open_rig(copies, delay_s=0.0)
    begin(rig, 1)
    rig.feed(Store(epoch=1, after=0, blocks=(BlockMove(1, 0, 3),)))
    for stage in rig.stages:
        rig.computed(stage, 0, stage.queue_step(-1, {}, {3: 77}))
    rig.until(lambda: stored(rig))
    began_s = time.monotonic()
    for stage in rig.stages:
        rig.computed(stage, 1, stage.queue_step(-1, {}, {5: 1}, takes_s=0.4))
    rig.feed(Prefetch(epoch=1, step=2, after=1, blocks=(BlockMove(1, 0, 5),)))
    assert [stage.loaded for stage in rig.stages] == [{2: 0}, {2: 0}]
    for stage in rig.stages:
        rig.computed(stage, 2, stage.queue_step(0, {5: 77}, {}))
    assert time.monotonic() - began_s < 0.4 or not rig.core.busy
    assert rig.core.busy
    rig.until(lambda: not rig.core.busy)
    for stage in rig.stages:
        stage.runtime.synchronize(stage.compute)
        assert not stage.wrong


@BOTH
def test_a_copy_waits_for_its_step_and_for_no_later_one(copies: str, open_rig: OpenRig) -> None:
    rig = open_rig(copies, delay_s=0.0, block_bytes=(3000,))
    begin(rig, 1)
    (stage,) = rig.stages
    rig.computed(stage, 0, stage.queue_step(-1, {}, {2: 9}))
    rig.computed(stage, 1, stage.queue_step(-1, {}, {}, takes_s=1.0))
    rig.feed(Store(epoch=1, after=0, blocks=(BlockMove(1, 0, 2),)))
    rig.until(lambda: stored(rig))
    assert not stage.runtime.finished(stage.kv._computed.events[1])  # type: ignore[attr-defined]
    assert (rig.host[0][rig.started[-1].runs[0].host_block] == 9).all()


@BOTH
def test_a_stage_that_died_takes_its_copies_along(
    copies: str, open_rig: OpenRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of copies. Its successor gets what was stored, and nothing that was not."""
    rig = open_rig(copies, delay_s=0.0)
    begin(rig, 1)
    first, second = rig.stages
    rig.feed(Store(epoch=1, after=0, blocks=(BlockMove(1, 0, 3),)))
    for stage in rig.stages:
        rig.computed(stage, 0, stage.queue_step(-1, {}, {3: 77}))
    rig.until(lambda: stored(rig) == {(1, 0)})
    for stage in rig.stages:
        takes_s = 0.3 if stage is second else 0.0
        rig.computed(stage, 1, stage.queue_step(-1, {}, {4: 78}, takes_s=takes_s))
    rig.feed(Store(epoch=1, after=1, blocks=(BlockMove(1, 1, 4),)))
    rig.kill(1)
    if copies == "daemon":
        monkeypatch.setattr(cuda_link, "is_running", lambda pid: False)
        monkeypatch.setattr(cuda_engine, "STUCK_S", 0.2)
        assert not rig.engine.let_go(1)
        with pytest.raises(CopiesStuckError, match="stage 1 died, and 1 copies"):
            rig.until(lambda: False)
        assert stored(rig) == {(1, 0)}
        rig.process.die()
        return
    first.runtime.synchronize(first.compute)
    rig.turn()
    assert rig.core.busy
    rig.restart(1)
    begin(rig, 2)
    assert stored(rig) == {(1, 0)}
    rig.feed(Drop(epoch=2, request=1, first_index=1))
    assert rig.core.host_blocks_used == 1
    rig.feed(Prefetch(epoch=2, step=5, after=-1, blocks=(BlockMove(1, 0, 9),)))
    for stage in rig.stages:
        rig.until(lambda s=stage: 5 in s.loaded)
        stage.queue_step(stage.loaded[5], {9: 77}, {})
    rig.until(lambda: not rig.core.busy)
    for stage in rig.stages:
        stage.runtime.synchronize(stage.compute)
        assert not stage.wrong


def test_a_dead_stages_pool_is_given_back_once_copies_are_at_rest(
    open_rig: OpenRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = open_rig("daemon", delay_s=0.0, block_bytes=(3000,))
    free_bytes = rig.stages[0].runtime.memory()[0]
    begin(rig, 1)
    (stage,) = rig.stages
    rig.computed(stage, 0, stage.queue_step(-1, {}, {3: 77}))
    rig.feed(Store(epoch=1, after=0, blocks=(BlockMove(1, 0, 3),)))
    rig.until(lambda: stored(rig))
    assert rig.engine.let_go(0)  # it lives, and keeps what it has
    rig.computed(stage, 1, stage.queue_step(-1, {}, {4: 78}))
    rig.feed(Store(epoch=1, after=1, blocks=(BlockMove(1, 1, 4),)))
    stage.runtime.synchronize(stage.compute)
    monkeypatch.setattr(cuda_link, "is_running", lambda pid: False)
    rig.kill(0)
    runtime = rig.process.open_runtime(0)
    rig.until(lambda: rig.engine.let_go(0))
    assert runtime.memory()[0] == free_bytes + NUM_DEVICE * 3000
    rig.feed(Prefetch(epoch=1, step=2, after=1, blocks=(BlockMove(1, 0, 1),)))  # not heard yet
    assert stored(rig) == {(1, 0)}, "a store that may have waited for nothing counts as none"
    rig.restart(0)
    begin(rig, 2)
    assert not rig.core.busy
    rig.feed(Prefetch(epoch=2, step=3, after=-1, blocks=(BlockMove(1, 0, 1),)))
    rig.stages[0].queue_step(rig.stages[0].loaded[3], {1: 77}, {})
    rig.until(lambda: not rig.core.busy)
    rig.stages[0].runtime.synchronize(rig.stages[0].compute)
    assert not rig.stages[0].wrong


@BOTH
def test_a_reset_waits_for_steps_in_flight(copies: str, open_rig: OpenRig) -> None:
    """Their kernels still write to blocks that loads of the new epoch may fill."""
    rig = open_rig(copies, delay_s=0.0, block_bytes=(3000,))
    begin(rig, 1)
    (stage,) = rig.stages
    rig.computed(stage, 0, stage.queue_step(-1, {}, {3: 77}))
    rig.feed(Store(epoch=1, after=0, blocks=(BlockMove(1, 0, 3),)))
    rig.until(lambda: stored(rig))
    rig.computed(stage, 1, stage.queue_step(-1, {}, {5: 1}, takes_s=0.3))
    stage.kv.detach()
    rig.feed(Reset(epoch=2))
    rig.feed(FromStage(0, stage.offer(2)))
    rig.turn()
    assert isinstance(rig.told[-1], ResetDone)
    assert not stage.kv.attached
    rig.until(lambda: stage.kv.attached)
    assert (stage.blocks[5] == 1).all()


@BOTH
def test_steps_that_never_end_are_an_error(
    copies: str, open_rig: OpenRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = open_rig(copies, delay_s=0.0, block_bytes=(3000,))
    begin(rig, 1)
    (stage,) = rig.stages
    stage.queue_step(-1, {}, {}, takes_s=0.4)
    monkeypatch.setattr(step_ring, "DRAIN_S", 0.1)
    stage.kv.detach()
    rig.feed(Reset(epoch=2))
    rig.feed(FromStage(0, stage.offer(2)))
    with pytest.raises(PipemaxSystemError, match="before a reset have not ended"):
        rig.until(lambda: stage.kv.attached)


@BOTH
def test_a_layout_that_is_not_the_stages_is_refused(copies: str, open_rig: OpenRig) -> None:
    rig = open_rig(copies)
    with pytest.raises(ConfigError, match=r"says \[3000, 5000\].*have \[3000, 4999\]"):
        rig.engine.lay_out((rig.host[0], rig.host[1][:, :4999]))


@BOTH
def test_an_offer_of_another_kind_is_refused(copies: str, open_rig: OpenRig) -> None:
    rig = open_rig(copies)
    other = open_rig("daemon" if copies == "stage" else "stage")
    with pytest.raises(PipemaxSystemError, match="stage 1 offers"):
        rig.engine.map_pool(other.stages[1].offer(1))


def test_host_tokens_lie_where_the_region_says(open_rig: OpenRig) -> None:
    """Both modes divide the pool alike."""
    rig = open_rig("stage")
    for stage, size in enumerate(BLOCK_BYTES):
        region = rig.engine.region(stage)
        assert region is not None
        assert (region.num_blocks, region.block_bytes) == (NUM_HOST, size)
        rig.host[stage][:] = stage + 1
        there = os.pread(region.handle.fd, NUM_HOST * size, region.offset_bytes)
        assert set(there) == {stage + 1}
