"""A sampler worker without its process: what is void, what is answered, and where it reads."""

from collections.abc import Iterator

import pytest
import torch
import zmq

from pipemax.proto.errors import InvariantError, WireError
from pipemax.proto.messages.control import (
    NO_TOKEN,
    RowExtras,
    RowLogprobs,
    SampleRow,
    SampleRules,
    StepPlan,
)
from pipemax.proto.messages.logits import LogitsAccepted, LogitsOffer, LogitsReady
from pipemax.proto.messages.registry import LOGITS
from pipemax.proto.messages.types import Message, pack_i32, unpack_i32
from pipemax.proto.wire import Codec, encode
from pipemax.stage_worker.channels.logits import LogitsSender, LogitsShape
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


class Wire:
    """A socket of the last stage's that keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.answers: list[Message] = []

    def send(self, frame: bytes, flags: int) -> None:
        self.sent.append(frame)

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self.answers:
            raise zmq.Again
        return [encode(self.answers.pop(0))]

    def take(self) -> list[Message]:
        sent, self.sent = self.sent, []
        return [Codec(LOGITS, at_binder=True).decode(frame) for frame in sent]


class World:
    """A last stage's exit and its samplers."""

    def __init__(self, num_samplers: int) -> None:
        self.workers = [SamplerWorker(Sampler()) for _ in range(num_samplers)]
        self.start_stage()

    def start_stage(self) -> None:
        self.exit = LogitsExit(SHAPE, len(self.workers))
        self.wires = [Wire() for _ in self.workers]
        self.sender = LogitsSender(self.wires, self.exit.place)  # type: ignore[arg-type]

    def offer(self, epoch: int) -> LogitsOffer:
        self.sender.reset(epoch)
        self.sender.offer()
        offers = [message for wire in self.wires for message in wire.take()]
        assert offers == offers[:1] * len(self.workers)
        assert isinstance(offers[0], LogitsOffer)
        return offers[0]

    def bring_up(self, epoch: int) -> None:
        offer = self.offer(epoch)
        for worker, wire in zip(self.workers, self.wires, strict=True):
            assert not self.sender.agreed
            assert worker.reset(epoch) is None
            accepted = worker.offered(offer)
            assert accepted == LogitsAccepted(epoch=epoch)
            wire.answers.append(accepted)
            self.sender.poll()
        assert self.sender.agreed

    def tell(self, plan: StepPlan, left: Sampled) -> list[list[LogitsReady]]:
        """What each sampler is sent."""
        self.sender.send(plan, left.shares)
        found = [wire.take() for wire in self.wires]
        assert all(isinstance(message, LogitsReady) for sent in found for message in sent)
        return found  # type: ignore[return-value]

    def step(self, plan: StepPlan, logits: torch.Tensor) -> tuple[list[int], list[RowLogprobs]]:
        """Tokens and logprobs, whoever gives them."""
        left = self.exit.take(plan, logits)
        tokens, logprobs = list(left.tokens), list(left.logprobs)
        for worker, sent in zip(self.workers, self.tell(plan, left), strict=True):
            for ready in sent:
                answer = worker.sample(ready)
                assert (answer is None) == (not ready.rows)
                if answer is None:
                    continue
                assert (answer.epoch, answer.step) == (plan.epoch, plan.step)
                rows = unpack_i32(answer.rows)
                for row, token in zip(rows, unpack_i32(answer.tokens), strict=True):
                    assert tokens[row] == NO_TOKEN
                    tokens[row] = token
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


def test_more_rows_than_an_entry_has_are_refused() -> None:
    world = World(1)
    plan = plan_of([row(item, 1.0) for item in range(ROWS + 1)])
    with pytest.raises(InvariantError, match="7 rows"):
        world.exit.take(plan, logits_of(1, ROWS + 1))
    world.close()


def test_what_is_not_of_the_present_epoch_is_void() -> None:
    world = World(1)
    (worker,) = world.workers
    world.bring_up(1)
    plan = plan_of([row(0, 1.0)], epoch=1)
    ((ready,),) = world.tell(plan, world.exit.take(plan, logits_of(1, 1)))
    assert worker.reset(2) is None
    assert worker.sample(ready) is None
    assert worker.offered(world.offer(1)) is None, "an older offer"
    world.sender.reset(2)
    world.wires[0].answers.append(LogitsAccepted(epoch=1))
    world.sender.poll()
    assert not world.sender.agreed
    world.close()


def test_who_ended_is_told_to_the_sampler_that_kept_its_rules() -> None:
    world = World(2)
    world.bring_up(1)
    plan = plan_of([row(0)], epoch=1, ended=(4, 7, 9))
    first, second = world.tell(plan, world.exit.take(plan, logits_of(1, 1)))
    assert [(message.ended, message.rows) for message in first] == [((4,), b"")]
    assert [(message.ended, message.rows) for message in second] == [((7, 9), b"")]
    world.close()


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
    world.step(plan_of([row(0)], epoch=1, ended=(3,)), logits_of(1, 1))
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
    world.start_stage()
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
