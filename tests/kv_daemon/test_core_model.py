"""The core in a world of a lawful coordinator, stages and memories: whatever is asked for and in
whatever order, KV is where it should be, and left alone, everything asked for is done."""

from random import Random
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipemax.kv_daemon.events import FromStage
from pipemax.proto.messages.control import BlockMove, Drop, Prefetch, Release, Reset, Store
from pipemax.proto.messages.kv import Computed
from support.kv_memories import Block
from support.kv_world import KvWorld

T = TypeVar("T")
RANDOM = st.randoms(use_true_random=True)
"""A seed: choices within a rule need no shrinking of their own."""


class Machine(KvWorld, RuleBasedStateMachine):
    @initialize(
        num_stages=st.integers(1, 3),
        host_blocks=st.integers(0, 8),
        piece_blocks=st.integers(1, 4),
        depth=st.integers(1, 3),
        merging=st.booleans(),
        queued=st.booleans(),
        pace=st.integers(1, 8),
        random=RANDOM,
    )
    def start(self, pace: int, random: Random, **world: Any) -> None:
        self.pace = pace
        self.random = random
        self.begin(**world)

    @precondition(lambda self: self.ready and self.free)
    @rule(random=RANDOM, in_order=st.booleans(), store_now=st.sampled_from([True, True, False]))
    def fill(self, random: Random, in_order: bool, store_now: bool) -> None:
        """A step fills new blocks of one or two requests."""
        step = self.plan()
        new: list[Block] = []
        known = [self.next_request, *sorted(self.requests.keys() - self.releasing.keys())]
        chosen = random.choices(known, k=random.randint(1, 2))
        wanted = random.randint(1, min(5, len(self.free)))
        for position, device in enumerate(self.targets(random, in_order, wanted)):
            request = chosen[position % len(chosen)]
            self.next_request = max(self.next_request, request + 1)
            blocks = self.requests.setdefault(request, [])
            self.free.remove(device)
            self.version += 1
            block = Block((request, len(blocks), self.version), device, step.step)
            blocks.append(block)
            new.append(block)
            step.fills[device] = block.token
            self.last_use[device] = step.step
        if store_now and new and self.host_used + len(new) <= self.host_blocks:
            self.send_store(new)

    @precondition(lambda self: self.ready and any(b.device is not None for b in self.blocks()))
    @rule(random=RANDOM)
    def store(self, random: Random) -> None:
        """Stores blocks on the device; some may be stored or being stored already."""
        there = [block for block in self.blocks() if block.device is not None]
        chosen = shuffled(random, there)[: random.randint(1, 5)]
        if self.host_used + sum(not b.store_sent for b in chosen) <= self.host_blocks:
            self.send_store(chosen)

    @precondition(lambda self: self.ready and any(b.stored for b in self.blocks()))
    @rule(random=RANDOM)
    def evict(self, random: Random) -> None:
        """Forgets device copies of stored blocks."""
        there = [block for block in self.blocks() if block.stored]
        for block in shuffled(random, there)[: random.randint(1, 5)]:
            self.give_up_device(block)

    @precondition(lambda self: self.ready and any(b.store_sent for b in self.blocks()))
    @rule(random=RANDOM, in_order=st.booleans())
    def prefetch(self, random: Random, in_order: bool) -> None:
        """A step reads blocks that a Prefetch brings for it, stored or being stored."""
        chosen = [block for block in self.blocks() if block.store_sent]
        if not in_order:
            chosen = shuffled(random, chosen)
        chosen = chosen[: random.randint(0, len(self.free))]
        targets = self.targets(random, in_order, len(chosen))
        step = self.plan()
        step.wait_for_load = True
        step.reads = {d: b.token for d, b in zip(targets, chosen, strict=True)}
        self.prefetches[step.step] = step.reads
        after = max((self.last_use[d] for d in step.reads), default=-1)
        moves = tuple(BlockMove(t[0], t[1], d) for d, t in step.reads.items())
        self.last_use.update(dict.fromkeys(step.reads, step.step))
        self.feed(Prefetch(epoch=self.epoch, step=step.step, after=after, blocks=moves))

    def targets(self, random: Random, in_order: bool, wanted: int) -> list[int]:
        free = sorted(self.free)
        return (free if in_order else shuffled(random, free))[:wanted]

    @precondition(lambda self: self.ready and self.requests)
    @rule(random=RANDOM, choice=st.sampled_from(["drop", "drop", "release"]))
    def forget(self, random: Random, choice: str) -> None:
        if choice == "drop":
            self.drop(random)
        else:
            self.release(random)

    def drop(self, random: Random) -> None:
        """Drops, and may at once use what that frees, copies under way or not."""
        request = random.choice(sorted(self.requests))
        first = random.randint(0, len(self.requests[request]))
        dropped = self.requests[request][first:]
        del self.requests[request][first:]
        self.gone.update(block.token for block in dropped)
        for block in dropped:
            self.give_up_device(block)
        self.feed(Drop(epoch=self.epoch, request=request, first_index=first))
        others = [b for b in self.blocks() if b.device is not None and not b.store_sent]
        others = others[: self.host_blocks - self.host_used]
        if others and random.random() < 0.5:
            self.send_store(others)

    def release(self, random: Random) -> None:
        chosen = shuffled(random, sorted(self.requests))[: random.randint(1, 2)]
        for request in chosen:
            blocks = self.requests.pop(request)
            self.releasing[request] = blocks
            self.gone.update(block.token for block in blocks)
            self.released_copies[request] = self.memories.touching(request)
        self.feed(Release(epoch=self.epoch, requests=tuple(chosen)))

    @precondition(lambda self: not self.ready or len(self.steps) > 12)
    @rule(random=RANDOM, keep=st.booleans())
    def reset(self, random: Random, keep: bool) -> None:
        """Any stages restart; some offers reach the daemon before the coordinator's Reset."""
        stages = range(self.num_stages)
        restarted = random.sample(stages, random.randint(0, self.num_stages))
        early = random.sample(stages, random.randint(0, self.num_stages))
        old_epoch = self.epoch
        self.begin_epoch(keep)
        if (
            random.random() < 0.5
        ):  # whether steps are numbered on or anew is the coordinator's choice
            self.first_step = 0
            self.computed = [-1] * self.num_stages
        self.stalled = random.choice([0, 0, 20, 60])
        for stage in restarted:
            self.memories.restart(stage)
            self.gpus[stage].restart()
            self.lives[stage] += 1
        for stage in early:
            self.attach_stage(stage)
        self.feed(Reset(epoch=self.epoch, keep_host_blocks=keep))
        self.feed(FromStage(0, Computed(epoch=old_epoch, step=10**6)))
        self.feed(Store(epoch=old_epoch, after=-1, blocks=(BlockMove(9, 9, 0),)))

    @rule()
    def wait(self) -> None:
        """Nothing new is asked for."""

    @invariant()
    def progress(self) -> None:
        """Between any two rules stages attach and compute and copies end, in any order."""
        if not hasattr(self, "core"):
            return
        random = self.random
        for _ in range(random.randint(0, self.pace)):
            missing = sorted(set(range(self.num_stages)) - self.attached)
            able = self.able()
            moves = self.gpu_moves()
            kinds = [kind for kind in (missing, able, moves) if kind]
            if not kinds:
                return
            kind = random.choice(kinds)
            if kind is missing:
                self.attach_stage(random.choice(missing))
            elif kind is able:
                self.compute_on(random.choice(able))
            else:
                random.choice(moves)()

    def teardown(self) -> None:
        """Left alone, everything asked for is done."""
        if not hasattr(self, "core"):
            return
        self.stalled = 0
        for stage in range(self.num_stages):
            if stage not in self.attached:
                self.attach_stage(stage)
        if not self.core._reset_seen:
            self.feed(Reset(epoch=self.epoch))
        progress = True
        while progress:
            moves = self.gpu_moves()
            progress = bool(moves)
            if moves:
                self.random.choice(moves)()
            for stage in range(self.num_stages):
                while self.can_compute(stage):
                    self.compute_on(stage)
                    progress = True
        assert self.ready
        assert not any(gpu.steps for gpu in self.gpus)
        assert not self.core.busy
        assert not self.releasing
        for stage in range(self.num_stages):
            assert self.computed[stage] == self.first_step + len(self.steps) - 1
            assert self.loaded[stage].keys() >= set(self.prefetches)
        assert all(block.stored for block in self.blocks() if block.store_sent)
        assert self.core.host_blocks_used == self.host_used
        assert self.core.queued_load_bytes() == (0,) * self.num_stages


def shuffled(random: Random, items: list[T]) -> list[T]:
    return random.sample(items, len(items))


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=100, deadline=None)
TestCore = Machine.TestCase
