"""Plays the coordinator for one stage that holds the whole model: several slots, each of which is
planned again as soon as its tokens are back."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.control import SampleRow, StepPlan
from pipemax.proto.messages.types import pack_i32


@dataclass
class Request:
    prompt: list[int]
    blocks: list[int]
    seed: int = 0
    temperature: float = 0.0
    banned: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    """Output so far."""
    computed: int = 0


class SlotDriver:
    """Each slot's requests: prompts in chunks of `chunk` tokens, then one token a step, until each
    has `length` output tokens."""

    def __init__(
        self,
        slots: list[list[Request]],
        *,
        length: int,
        block_size: int,
        chunk: int = 16,
        epoch: int = 1,
    ) -> None:
        self.slots = slots
        self.length = length
        self.epoch = epoch
        self._block_size = block_size
        self._chunk = chunk
        self._next_step = 0
        self._under_way: dict[int, tuple[int, list[tuple[Request, int, bool]]]] = {}

    @property
    def tokens(self) -> list[list[int]]:
        return [request.tokens for slot in self.slots for request in slot]

    @property
    def finished(self) -> bool:
        return all(len(tokens) >= self.length for tokens in self.tokens)

    def begin(self, add: Callable[[StepPlan], None]) -> None:
        for slot in range(len(self.slots)):
            self._plan(slot, add)

    def done(self, step: int, tokens: list[int] | None, add: Callable[[StepPlan], None]) -> None:
        slot, parts = self._under_way.pop(step)
        assert tokens is not None
        picked = iter(tokens)
        for request, count, samples in parts:
            request.computed += count
            if samples:
                request.tokens.append(next(picked))
        assert next(picked, None) is None
        self._plan(slot, add)

    def _plan(self, slot: int, add: Callable[[StepPlan], None]) -> None:
        parts, tokens, blocks, rows = [], [], [], []
        for request in self.slots[slot]:
            if len(request.tokens) >= self.length:
                continue
            known = request.prompt + request.tokens
            new = known[request.computed :][: self._chunk]
            samples = request.computed + len(new) == len(known)
            if samples:
                rows.append(
                    SampleRow(
                        len(parts),
                        request.seed,
                        len(request.tokens),
                        request.temperature,
                        0,
                        1.0,
                        0.0,
                        request.banned,
                    )
                )
            parts.append((request, len(new), samples))
            tokens.append(new)
            blocks.append(
                request.blocks[: blocks_for(request.computed + len(new), self._block_size)]
            )
        if not parts:
            return
        step = self._next_step
        self._next_step += 1
        self._under_way[step] = (slot, parts)
        add(
            StepPlan(
                epoch=self.epoch,
                step=step,
                slot=slot,
                wait_for_load=False,
                num_tokens=pack_i32([len(new) for new in tokens]),
                context_lens=pack_i32([request.computed for request, _, _ in parts]),
                block_counts=pack_i32([len(ids) for ids in blocks]),
                block_tables=pack_i32([block for ids in blocks for block in ids]),
                token_ids=pack_i32([token for new in tokens for token in new]),
                sample=tuple(rows),
            )
        )
