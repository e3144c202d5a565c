"""The scheduling core: `handle(event, now) → commands` over explicit state.

No sockets, no clock, no threads: the coordinator process and the simulator run the same core.
"""

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

import msgspec

from pipemax.coordinator import invariants
from pipemax.coordinator.events import (
    BlocksStored,
    Cancelled,
    Command,
    Event,
    FinishRequest,
    KvReleased,
    LinkMeasured,
    Paused,
    Resumed,
    StageComputed,
    StepReturned,
    Submitted,
    ToDaemon,
)
from pipemax.coordinator.phases import MixedPrefill, Prefill
from pipemax.coordinator.planner import Planner
from pipemax.coordinator.policy import OldestFirst, SelectionPolicy
from pipemax.coordinator.recovery import restart_from
from pipemax.coordinator.request import Request
from pipemax.coordinator.state import Decodes, Item, SchedulerLimits, SchedulerState
from pipemax.coordinator.waiting import Newcomer
from pipemax.proto.messages.control import NO_TOKEN
from pipemax.proto.messages.ingest import FinishReason

_KEY = attrgetter("key")


class PlannedRows(NamedTuple):
    """Whom the sample rows of a step belong to."""

    keys: Sequence[int]
    scored: frozenset[int] = frozenset()
    """Rows that give logprobs of the request's next prompt token; the others give its next
    token."""


class Scheduler:
    """The only brain: decides what runs, where KV lives, and when a request is done."""

    def __init__(
        self,
        limits: SchedulerLimits,
        policy: SelectionPolicy | None = None,
        prefill: Prefill | None = None,
    ) -> None:
        """Without a `prefill`, prompts are mixed into decode steps."""
        self.state = SchedulerState(limits)
        self._planner = Planner(self.state, policy or OldestFirst(), prefill or MixedPrefill())

    def handle(self, event: Event, now: float) -> list[Command]:
        """Apply one event; `now` is any monotonic clock in seconds."""
        commands = self._apply(event, now)
        if isinstance(event, StageComputed | LinkMeasured):
            return commands  # measurements alone change nothing that could be planned
        return commands + self._planner.pump(now)

    def check_invariants(self) -> None:
        """Raises InvariantError when blocks or requests are lost or counted twice."""
        invariants.check(self.state)

    def rows_of(self, step: int) -> PlannedRows:
        """The sample rows of a step's plan. Empty for a step that is not in flight."""
        flight = self.state.in_flight.get(step)
        keys: list[int] = []
        scored: list[int] = []
        for part in flight.parts if flight else ():
            if isinstance(part, Decodes):
                keys += map(_KEY, part.requests)
                continue
            scored += range(len(keys), len(keys) + part.scored)
            keys += [part.request.key] * (part.scored + part.samples)
        return PlannedRows(keys, frozenset(scored))

    def _apply(self, event: Event, now: float) -> list[Command]:
        match event:
            case Submitted():
                self._submit(event, now)
            case Cancelled(key, choices):
                return [command for i in range(choices) for command in self._cancel(key + i)]
            case StepReturned():
                return self._step_returned(event, now)
            case StageComputed():
                self.state.stage_computed(event)
            case BlocksStored(kv_keys, indices):
                for kv_key, index in zip(kv_keys, indices, strict=True):
                    self.state.block_stored(kv_key, index)
            case KvReleased(kv_keys):
                for kv_key in kv_keys:
                    self.state.released(kv_key)
            case LinkMeasured(load_bytes, load_seconds):
                for stage, (size, seconds) in enumerate(zip(load_bytes, load_seconds, strict=True)):
                    self.state.budget.link_measured(stage, size, seconds)
            case Paused():
                self.state.paused = True
            case Resumed():
                return restart_from(self.state, event) + self._finish_cancelled()
        return []

    def _submit(self, event: Submitted, now: float) -> None:
        prompt, sampling = array("i", event.prompt_token_ids), event.sampling
        for index in range(event.sampling.n):
            key, seed = event.key + index, (event.seed + index) % 2**64
            self.state.waiting.put_last(
                Newcomer(
                    key, prompt, sampling, seed, now, event.job, event.bad_words, event.grammar
                )
            )
            if index == 0 and sampling.prompt_logprobs is not None:  # one choice brings them
                sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)

    def _cancel(self, key: int) -> list[Command]:
        state = self.state
        waiting = state.waiting.remove(key)
        if waiting is not None:
            return [self._result(waiting, "abort", None)]
        running = state.running.get(key)
        if running is None:
            return []
        running.cancelled = True
        running.quiet_until = 0  # its next token is looked at
        return [] if running.in_flight else self._finish(running, "abort", None)

    def _finish_cancelled(self) -> list[Command]:
        """After a reset: requests that waited for a step which never came back."""
        state = self.state
        commands: list[Command] = []
        for request in [r for r in state.waiting.ran_before() if r.cancelled]:
            state.waiting.remove(request.key)
            commands.append(self._result(request, "abort", None))
        for request in [r for r in state.running.values() if r.cancelled]:
            commands += self._finish(request, "abort", None)
        return commands

    def _step_returned(self, event: StepReturned, now: float) -> list[Command]:
        state = self.state
        flight = state.in_flight.pop(event.step, None)
        if flight is None:
            return []
        state.blocks.settle(event.step)
        tokens = iter(event.tokens)
        commands: list[Command] = []
        for part in flight.parts:
            if isinstance(part, Decodes):
                commands += self._decodes_returned(part, tokens, event, now)
            else:
                commands += self._item_returned(part, tokens, event, now)
        return commands

    def _decodes_returned(
        self, part: Decodes, tokens: Iterator[int], event: StepReturned, now: float
    ) -> list[Command]:
        """As `_item_returned` of each, which is what happens where there is more to it than one
        token: all of them together cost about what a few of those do."""
        state, rosters = self.state, self.state.rosters
        requests = part.requests
        given = list(islice(tokens, len(requests)))
        if NO_TOKEN in given:
            each = iter(given)
            return [c for i in part.items for c in self._item_returned(i, each, event, now)]
        state.forecast.all_grown(requests)
        state.counters.generation_tokens += len(requests)
        commands: list[Command] = []
        gone: set[int] = set()
        stopped = event.stopped
        for request, token in zip(requests, given, strict=True):
            request.in_flight = 0
            request.computed = request.planned
            known = request.tokens
            known.append(token)
            if (
                len(known) >= request.quiet_until
                or token in request.end_tokens
                or (stopped and request.key in stopped)
            ):
                ended = self._look_at(request, token, event)
                if ended:
                    commands += ended
                    gone.add(request.key)
        rosters.come_back([r for r in requests if r.key not in gone] if gone else requests)
        return commands

    def _look_at(self, request: Request, token: int, event: StepReturned) -> list[Command]:
        """The request has got `token` and may have ended with it. Nothing if it has not."""
        self.state.forecast.aged(request)
        reason, stop_reason = self._why_finished(request, token, event)
        if request.cancelled:
            reason = reason or "abort"
        return self._finish(request, reason, stop_reason) if reason else []

    def _item_returned(
        self, item: Item, tokens: Iterator[int], event: StepReturned, now: float
    ) -> list[Command]:
        request = item.request
        request.in_flight -= 1
        request.computed = item.end
        if item.scored:
            request.num_scored = item.last_target + 1
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        if item.samples:
            token = next(tokens)
            if token == NO_TOKEN:
                reason = "error"
            else:
                request.tokens.append(token)
                self.state.counters.generation_tokens += 1
                if request.first_token_at is None:
                    request.first_token_at = now
                self.state.forecast.grown(request)
                reason, stop_reason = self._why_finished(request, token, event)
        self.state.rosters.place(request)
        if request.cancelled:
            return (
                [] if request.in_flight else self._finish(request, reason or "abort", stop_reason)
            )
        return self._finish(request, reason, stop_reason) if reason else []

    def _why_finished(
        self, request: Request, token: int, event: StepReturned
    ) -> tuple[FinishReason | None, int | str | None]:
        sampling, limits = request.sampling, self.state.limits
        num_outputs = request.num_outputs
        if num_outputs >= sampling.min_tokens:
            if token in request.end_tokens:
                is_eos = token in limits.eos_token_ids and not sampling.ignore_eos
                return "stop", None if is_eos else token
            if request.key in event.stopped:
                return "stop", event.stopped[request.key]
        return ("length" if len(request.tokens) >= request.ends_at else None), None

    def _finish(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None
    ) -> list[Command]:
        if reason in ("stop", "length"):
            self.state.forecast.finished(request)
        release = self.state.forget_kv(request)
        commands: list[Command] = [ToDaemon(release)] if release else []
        return [*commands, self._result(request, reason, stop_reason)]

    def _result(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None
    ) -> FinishRequest:
        self.state.counters.finished += 1
        if request.rules_epoch == self.state.epoch:
            self.state.ended_rules.append(request.key)
        return FinishRequest(
            request.key,
            request.output_token_ids,
            reason,
            stop_reason,
            request.admitted_at,
            request.first_token_at,
        )
