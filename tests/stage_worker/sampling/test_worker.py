"""A sampler worker without its process: what is void, what is answered, and where it reads."""

from collections.abc import Iterator

import pytest
import torch

from pipemax.proto.errors import InvariantError, WireError
from pipemax.proto.messages.control import NO_TOKEN, RowExtras, SampleRow, SampleRules, StepPlan
from pipemax.proto.messages.logits import LogitsAccepted, LogitsOffer, LogitsReady
from pipemax.proto.messages.types import pack_i32, unpack_i32
from pipemax.stage_worker.channels.logits import LogitsShape
from pipemax.stage_worker.sampling import Sampled, Sampler
from pipemax.stage_worker.sampling.logits_exit import LogitsExit
from pipemax.stage_worker.sampling.worker import SamplerWorker
from support.step_plans import plan_of

VOCAB, SLOTS, ROWS = 50, 2, 6
SHAPE = LogitsShape(SLOTS, ROWS, VOCAB)
PENALTY = SampleRules(presence_penalty=1e3)


def row(
    item: int, temperature: float = 0.0, request: int = -1, rules: SampleRules | None = None,
    num_logprobs: int = -1, position: int = 0,
) -> SampleRow:  # fmt: skip
    extras = None
    if request >= 0 or num_logprobs >= 0:
        extras = RowExtras(request, rules, num_logprobs)
    return SampleRow(item, 7 + item, position, temperature, 0, 0.9, 0.0, extras=extras)


class World:
    """A last stage's exit and its samplers."""

    def __init__(self, num_samplers: int) -> None:
        self.exit = LogitsExit(SHAPE, num_samplers)
        self.workers = [SamplerWorker(Sampler()) for _ in range(num_samplers)]

    def offer(self, epoch: int) -> LogitsOffer:
        return LogitsOffer(
            epoch=epoch,
            handle=self.exit.place.handle,
            num_slots=SLOTS,
            max_rows=ROWS,
            vocab_size=VOCAB,
        )

    def bring_up(self, epoch: int) -> None:
        for worker in self.workers:
            assert worker.reset(epoch) is None
            assert worker.offered(self.offer(epoch)) == LogitsAccepted(epoch=epoch)

    def ready(self, plan: StepPlan, left: Sampled, index: int) -> LogitsReady:
        first = sum(map(len, left.shares[:index]))
        rows = left.shares[index]
        return LogitsReady(
            epoch=plan.epoch,
            step=plan.step,
            slot=plan.slot,
            first_row=first,
            rows=pack_i32(rows),
            sample=tuple(plan.sample[r] for r in rows),
        )

    def step(self, plan: StepPlan, logits: torch.Tensor) -> tuple[list[int], list[object]]:
        """Tokens and logprobs, whoever gives them."""
        left = self.exit.take(plan, logits)
        tokens, logprobs = list(left.tokens), list(left.logprobs)
        for index, worker in enumerate(self.workers if left.shares else ()):
            answer = worker.sample(self.ready(plan, left, index))
            assert (answer is None) == (not left.shares[index])
            if answer is not None:
                for place, token in zip(
                    unpack_i32(answer.rows), unpack_i32(answer.tokens), strict=True
                ):
                    assert tokens[place] == NO_TOKEN
                    tokens[place] = token
                logprobs += answer.logprobs
        return tokens, sorted(logprobs, key=lambda found: found.row)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.exit.close()


@pytest.fixture(params=[1, 2, 3])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


def logits_of(seed: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_tokens_and_logprobs_are_those_of_one_sampler(world: World) -> None:
    """Over steps, with state that grows."""
    world.bring_up(1)
    alone = Sampler()
    for step in range(4):
        sent = PENALTY if step == 0 else None
        rows = (
            row(0),
            row(1, 0.8),
            row(2, 0.0, request=5, rules=sent, position=step),
            row(3, 0.9, request=8, rules=sent, num_logprobs=2, position=step),
            row(4, 1.1, num_logprobs=0),
            row(5),
        )
        plan = plan_of(rows, slot=step % SLOTS, epoch=1)
        logits = logits_of(step % 2, len(rows))
        before = logits.clone()
        tokens, logprobs = world.step(plan, logits)
        wanted = alone.sample(plan, logits)
        assert tokens == wanted.tokens
        assert tuple(logprobs) == wanted.logprobs
        assert torch.equal(logits, before)


def test_plain_greedy_rows_stay_with_the_stage(world: World) -> None:
    plan = plan_of((row(0), row(1)))
    left = world.exit.take(plan, logits_of(1, 2))
    assert left.shares == ()
    assert NO_TOKEN not in left.tokens


def test_what_is_not_of_the_present_epoch_is_void(world: World) -> None:
    worker = world.workers[0]
    plan = plan_of([row(0, 1.0)], epoch=1)
    left = world.exit.take(plan, logits_of(1, 1))
    world.bring_up(1)
    assert worker.reset(2) is None
    assert worker.sample(world.ready(plan, left, 0)) is None
    assert worker.offered(world.offer(1)) is None, "an older offer"


def test_an_offer_that_is_faster_than_the_reset_is_answered_with_it(world: World) -> None:
    worker = world.workers[0]
    assert worker.offered(world.offer(2)) is None
    assert worker.reset(2) == LogitsAccepted(epoch=2)
    assert worker.offered(world.offer(2)) == LogitsAccepted(epoch=2), "our answer was lost"


def test_a_reset_forgets_rules_and_so_does_the_end_of_a_request() -> None:
    world = World(1)
    world.bring_up(1)
    rows = [row(0, 0.5, request=3, rules=PENALTY)]
    world.step(plan_of(rows, epoch=1), logits_of(1, 1))
    (worker,) = world.workers
    ready = LogitsReady(epoch=1, step=9, slot=0, first_row=0, rows=b"", sample=(), ended=(3,))
    assert worker.sample(ready) is None
    again = plan_of([row(0, 0.5, request=3, position=1)], epoch=1)
    with pytest.raises(InvariantError, match="rules were never sent"):
        world.step(again, logits_of(1, 1))
    world.step(plan_of(rows, epoch=1), logits_of(1, 1))
    world.bring_up(2)
    with pytest.raises(InvariantError, match="rules were never sent"):
        world.step(plan_of([row(0, 0.5, request=3, position=1)], epoch=2), logits_of(1, 1))
    world.close()


def test_a_stage_that_was_started_again_has_another_ring() -> None:
    world = World(1)
    world.bring_up(1)
    world.exit.close()
    world.exit = LogitsExit(SHAPE, 1)
    world.bring_up(2)
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, 42] = 50.0
    assert world.step(plan_of([row(0, 0.5)], epoch=2), logits)[0] == [42]
    world.close()


def test_the_ring_of_a_stage_that_is_gone_is_asked_for_again() -> None:
    world = World(1)
    world.workers[0].reset(1)
    offer = world.offer(1)
    world.exit.close()
    assert world.workers[0].offered(offer) is None
    with pytest.raises(WireError, match="before the ring was agreed"):
        world.workers[0].sample(
            LogitsReady(epoch=1, step=1, slot=0, first_row=0, rows=b"", sample=())
        )


@pytest.mark.parametrize(
    "fields",
    [{"slot": SLOTS}, {"first_row": ROWS}, {"rows": pack_i32([0, 1])}],
    ids=["no such slot", "beyond the entry", "more rows than sample rows"],
)
def test_a_message_that_does_not_fit_is_refused(fields: dict[str, object]) -> None:
    world = World(1)
    world.bring_up(1)
    good: dict[str, object] = {"slot": 0, "first_row": 0, "rows": pack_i32([0])}
    ready = LogitsReady(epoch=1, step=1, sample=(row(0, 1.0),), **{**good, **fields})  # type: ignore[arg-type]
    with pytest.raises(WireError):
        world.workers[0].sample(ready)
    world.close()


def test_a_ring_larger_than_its_memory_is_refused() -> None:
    world = World(1)
    world.workers[0].reset(1)
    offer = LogitsOffer(
        epoch=1,
        handle=world.exit.place.handle,
        num_slots=SLOTS,
        max_rows=2 * ROWS,
        vocab_size=VOCAB,
    )
    with pytest.raises(WireError, match="in memory of"):
        world.workers[0].offered(offer)
    world.close()
