"""What the last stage and the samplers say of one step, put together. Pure.

Where no sampler takes part, a step is whole with the last stage's StepDone. Else some of its rows
come from samplers, each sampler's in one message, in any order and before StepDone maybe. Messages
of epochs that ended must not get here.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from pipemax.coordinator.core import PlannedRows
from pipemax.coordinator.events import StepReturned
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import NO_TOKEN, RowLogprobs, RowsSampled, StepDone
from pipemax.proto.messages.types import unpack_i32


@dataclass(frozen=True, slots=True)
class WholeStep:
    tokens: Sequence[int]
    """One per sample row of the plan."""
    logprobs: Mapping[int, RowLogprobs]
    """By sample row, of those that ask for them."""


@dataclass(slots=True)
class _Part:
    """A step of which something is known and something is missing."""

    tokens: dict[int, int] = field(default_factory=dict)
    """By row: what samplers sent."""
    logprobs: dict[int, RowLogprobs] = field(default_factory=dict)
    done: StepDone | None = None


class StepParts:
    """Steps of the present epoch that are not whole yet, by step."""

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}

    def reset(self) -> None:
        """The epoch has ended: no step in flight will ever be whole."""
        self._parts.clear()

    def stage_done(self, message: StepDone) -> WholeStep | None:
        """From the last stage. None while samplers are not done. Raises InvariantError when what
        was said of the step contradicts itself."""
        part = self._parts.setdefault(message.step, _Part())
        part.done = message
        return self._whole(message.step, part)

    def rows_sampled(self, message: RowsSampled) -> WholeStep | None:
        """From a sampler. None, or the step that this was the last part of. Raises as above."""
        part = self._parts.setdefault(message.step, _Part())
        rows, tokens = unpack_i32(message.rows), unpack_i32(message.tokens)
        if len(rows) != len(tokens) or not part.tokens.keys().isdisjoint(rows):
            raise InvariantError(
                f"step {message.step}: a sampler brought {len(tokens)} tokens for rows {list(rows)}"
                f", after rows {sorted(part.tokens)}"
            )
        part.tokens.update(zip(rows, tokens, strict=True))
        part.logprobs.update(_by_row(message.logprobs))
        return self._whole(message.step, part)

    def _whole(self, step: int, part: _Part) -> WholeStep | None:
        done = part.done
        if done is None:
            return None
        assert done.tokens is not None
        expected = set(unpack_i32(done.elsewhere))
        if not part.tokens.keys() <= expected:
            raise InvariantError(
                f"step {step}: samplers brought rows {sorted(part.tokens)}, they were sent "
                f"{sorted(expected)}"
            )
        if len(part.tokens) < len(expected):
            return None
        del self._parts[step]
        tokens = unpack_i32(done.tokens)
        if expected and max(expected) >= len(tokens):
            raise InvariantError(f"step {step} has {len(tokens)} rows, samplers {sorted(expected)}")
        for row, token in part.tokens.items():
            tokens[row] = token
        return WholeStep(tokens, {**_by_row(done.logprobs), **part.logprobs})


class Outputs(Protocol):
    """Who turns tokens into text."""

    @property
    def listening(self) -> Set[int]:
        """Requests that are to be told of every token; the others' are looked at in the end."""
        ...

    def scored(self, key: int, logprobs: RowLogprobs | None) -> None:
        """Logprobs of a request's next prompt token."""

    def token(self, key: int, token_id: int, logprobs: RowLogprobs | None = None) -> str | None:
        """A request's next token; the stop string that it completes, if any."""


def hand_out(step: int, whole: WholeStep, rows: PlannedRows, outputs: Outputs) -> StepReturned:
    """Gives `outputs` what is theirs, and the scheduler what is left. `rows` are those of the
    step's plan; raises InvariantError when they are not as many as there are tokens: going on
    without the step would leave its requests waiting for ever."""
    keys, scored, tokens = rows.keys, rows.scored, whole.tokens
    if len(tokens) != len(keys):
        raise InvariantError(f"step {step} brought {len(tokens)} tokens for {len(keys)} requests")
    for index in sorted(scored):
        outputs.scored(keys[index], whole.logprobs.get(index))
    stopped: dict[int, str] = {}
    if not outputs.listening.isdisjoint(keys):
        listening = outputs.listening
        for index in [index for index, key in enumerate(keys) if key in listening]:
            key, token = keys[index], tokens[index]
            if index in scored or token == NO_TOKEN:
                continue
            stop = outputs.token(key, token, whole.logprobs.get(index))
            if stop is not None:
                stopped[key] = stop
    if scored:
        tokens = [token for index, token in enumerate(tokens) if index not in scored]
    return StepReturned(step, tokens, stopped)


def _by_row(logprobs: Iterable[RowLogprobs]) -> dict[int, RowLogprobs]:
    return {found.row: found for found in logprobs}
