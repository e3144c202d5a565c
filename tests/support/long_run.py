"""Both cores driven for many events by a load that does not end, with troubles at random moments.

After every event, beside the cores' own invariants: every accepted request is waiting, running or
finished, exactly one of them and once; the steps that a request waits for its next turn are
bounded; and so are the steps in which the queue for admission stands still.
"""

from collections import deque
from dataclasses import dataclass

from pipemax.coordinator.assembly import DAEMON
from pipemax.coordinator.events import Event
from pipemax.coordinator.kv_moves import STAGING_SHARE
from pipemax.coordinator.policy import MIN_OVERDUE_TURNS
from pipemax.proto.messages import control
from pipemax.proto.messages.ingest import SamplingParams
from pipemax.proto.messages.types import Message
from support.scheduler_world import VOCAB, expected_output
from support.two_cores_world import COORDINATOR, TwoCores


@dataclass(frozen=True)
class Rates:
    """How often something goes wrong, per event."""

    death: float = 0.0
    """A stage, the daemon or both die."""
    cancel: float = 0.0
    hold: float = 0.0
    """Messages between two processes are delayed for a while."""
    again: float = 0.0
    """A message that may come again, or late, does."""


class LongRun(TwoCores):
    """`most_unfinished`: requests that wait or run at a time, while there is load."""

    def __init__(self, seed: int, rates: Rates, *, most_unfinished: int, **shape: object) -> None:
        self.rates = rates
        self.most_unfinished = most_unfinished
        self.requests: dict[int, tuple[list[int], SamplingParams]] = {}
        self.cancelled: set[int] = set()
        self.held: dict[tuple[str, str], int] = {}
        """Event at which messages between these two are read again."""
        self.said: deque[tuple[str, str, Message]] = deque(maxlen=400)
        self.hellos: dict[str, Message] = {}
        """The last of each process."""
        self.longest_wait = 0.0
        """Rotations that a running request waited for its turn, beyond MIN_OVERDUE_TURNS and not
        counting what a recovery cost it."""
        self.longest_standstill = 0.0
        """Steps in which the first in the queue stayed the first, in rotations per token."""
        self._waits: dict[int, tuple[int, float]] = {}
        """By request: its last turn, and the rotations it waited since."""
        self._measured_step = 0
        self._measured_epoch = 0
        self._head: tuple[int, int] | None = None
        """The first in the queue, and the step at which it became so."""
        super().__init__(seed, **shape)  # type: ignore[arg-type]

    def run(self, events: int) -> None:
        """Load and troubles for so many events; then what was accepted runs to its end."""
        while self.events < events:
            if self.random.random() < 0.2 and self._num_unfinished < self.most_unfinished:
                self._submit_one()
            self._strike()
            self.step()
        self.rates = Rates()
        while self.step():
            assert self.events < 10 * events, "the world does not come to rest"

    def step(self) -> bool:
        if super().step():
            return True
        if not self.held:
            return False
        self.held.clear()  # nothing else happens: time passes
        return super().step()

    def delivers(self, link: tuple[str, str]) -> bool:
        return self.held.get(link, 0) <= self.events

    def send(self, sender: str, receiver: str, *messages: Message) -> None:
        super().send(sender, receiver, *messages)
        self.said.extend((sender, receiver, message) for message in messages)
        if isinstance(messages[0], control.Hello):
            self.hellos[sender] = messages[0]

    # Load and troubles

    @property
    def _num_unfinished(self) -> int:
        return len(self.requests) - len(self.finished)

    def _submit_one(self) -> None:
        """Mixed lengths and ways to stop."""
        draw, half = self.random, self.max_model_len // 2
        outputs = draw.randint(1, min(30, half))
        sampling = SamplingParams(
            max_tokens=outputs,
            min_tokens=draw.choice([0, 0, draw.randint(0, outputs)]),
            stop_token_ids=tuple(draw.sample(range(VOCAB), draw.choice([0, 0, 3]))),
            ignore_eos=draw.random() < 0.5,
        )
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, min(60, half)))]
        key = len(self.requests)
        self.requests[key] = (prompt, sampling)
        self.submit(key, prompt, sampling)

    def _strike(self) -> None:
        draw, rates = self.random, self.rates
        if draw.random() < rates.death:
            victim = draw.randint(-2, len(self.stages) - 1)
            if victim < 0 and self.daemon is not None:
                self.kill_daemon()
            if victim != -1:
                self.kill_stage(max(0, victim))
        if draw.random() < rates.cancel and self.requests:
            key = draw.randrange(max(0, len(self.requests) - 12), len(self.requests))
            self.cancelled.add(key)
            self.cancel(key)
        if draw.random() < rates.hold and self.queues:
            self.held[draw.choice(list(self.queues))] = self.events + draw.randint(1, 200)
        if draw.random() < rates.again:
            self._say_again()

    def _say_again(self) -> None:
        """One of what may come again; every kind of message as often, however rare it is."""
        kinds: dict[str, list[tuple[str, str, Message]]] = {}
        for one in self.said:
            if self._may_come_again(*one):
                kinds.setdefault(type(one[2]).__name__, []).append(one)
        if kinds:
            super().send(*self.random.choice(kinds[self.random.choice(sorted(kinds))]))

    def _may_come_again(self, sender: str, receiver: str, message: Message) -> bool:
        """Hello comes with every beat; a Release that was said again is answered again; and what
        belongs to an epoch that the receiver has left may be arbitrarily late."""
        if isinstance(message, control.Hello):
            return self.is_alive(sender) and message is self.hellos[sender]
        if isinstance(message, control.Released):
            return True
        epoch = getattr(message, "epoch", None)
        if epoch is None:
            return False
        if receiver == COORDINATOR:
            return bool(epoch < self.assembly.epoch)
        if receiver == DAEMON:
            return self.daemon is not None and epoch < self.daemon.epoch
        return bool(epoch < self.stages[int(receiver.removeprefix("stage-"))].epoch)

    # What holds after every event

    def tell(self, event: Event) -> None:
        super().tell(event)
        state = self.scheduler.state
        unfinished = [*state.waiting, *state.running]
        assert len(unfinished) + len(self.finished) == len(self.requests), "a request is lost"
        assert self.finished.keys().isdisjoint(unfinished), "a finished request is still served"
        if not state.paused:
            self._measure_waits()

    def _measure_waits(self) -> None:
        """A rotation: steps in which everybody who runs could have had a turn, the slots' part, the
        link's part and the prompts' part one after the other."""
        state = self.scheduler.state
        limits, running = state.limits, state.running.values()
        room = max(1.0, min(state.budget.per_step, STAGING_SHARE * state.blocks.num_blocks))
        prompts = sum(request.remaining for request in running if request.remaining > 1)
        rotation = len(running) + limits.num_slots + state.total_blocks / room
        rotation += prompts / limits.max_num_batched_tokens
        steps, self._measured_step = state.next_step - self._measured_step, state.next_step
        before, self._waits = self._waits, {}
        if state.epoch != self._measured_epoch:
            self._measured_epoch = state.epoch
            before = {}
        for request in running:
            if not request.in_flight:
                last_turn, waited = before.get(request.key, (request.last_turn, 0.0))
                if last_turn != request.last_turn:
                    waited = 0.0
                elif state.next_step - last_turn > MIN_OVERDUE_TURNS:
                    waited += steps / rotation
                self._waits[request.key] = (request.last_turn, waited)
                self.longest_wait = max(self.longest_wait, waited)
        head = next(iter(state.waiting), None)
        if head is None:
            self._head = None
        elif self._head is None or self._head[0] != head:
            self._head = (head, state.next_step)
        else:
            tokens = state.limits.max_model_len
            stood = (state.next_step - self._head[1]) / (rotation * tokens)
            self.longest_standstill = max(self.longest_standstill, stood)

    def check_results(self) -> None:
        """Every request finished once, with the tokens it must bring, and nothing is left."""
        assert set(self.finished) == set(self.requests)
        for key, (prompt, sampling) in self.requests.items():
            result = self.finished[key]
            output, reason = expected_output(prompt, sampling, self.max_model_len)
            if result.finish_reason == "abort":
                assert key in self.cancelled
                output, reason = output[: len(result.output_token_ids)], "abort"
            assert (list(result.output_token_ids), result.finish_reason) == (output, reason)
        state = self.scheduler.state
        assert state.blocks.num_free == self.num_blocks
        assert state.host_used == 0
        assert not state.releasing
        assert not state.by_kv_key
        assert self.daemon is not None
        assert self.daemon.host_blocks_used == 0
        assert not self.daemon.busy
