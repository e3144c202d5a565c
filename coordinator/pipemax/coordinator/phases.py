"""When prompts are computed and when requests decode: mixed in every step, or in long phases.

`mixed` cuts prompts into chunks that ride on the decode steps. `phases` keeps them apart, by the
rules of TD-Pipe carried over to this scheduler:

- A prefill phase computes prompts only, in chunks as large as a step allows. Admission stops when
  the KV use predicted for the coming decode steps peaks at 0.9 of the blocks; once nothing that was
  admitted is left to compute, the phase ends. It also ends when it has computed as many tokens as
  all blocks hold: requests that end with their first token would otherwise keep those who decode
  waiting for ever.
- A decode phase admits nobody and computes no prompt. It ends when decoding has become less
  efficient than switching. The efficiency of decoding is its rate, in tokens per second by the cost
  model, over the best rate of the phase. That of switching is the share of time that is not lost to
  it: the coming prefill phase of T seconds pays for two switches. From decode to prefill, stage s
  of S waits s times until the first long step arrives, each time for |T_prefill − T_decode|; from
  prefill to decode it waits S − 1 − s times for a slot that is still on its way behind it. Each
  stage so loses (S − 1)·|T_prefill − T_decode| to both together. There are as many stages as slots.

Where one phase has nothing to do, the other takes over at once, so nothing waits for ever. To
compute again what a preemption or a crash took is prefill.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pipemax.proto.errors import ConfigError

DEFAULT_PREFILL = "mixed"
PEAK_SHARE = 0.9
"""Of all blocks: the predicted peak use at which a prefill phase admits no more."""


class Part(NamedTuple):
    """Who may take part in the next step."""

    prompts: bool
    decodes: bool

    def admits(self, remaining_tokens: int) -> bool:
        """A request that lacks so many tokens to its next sample: one, where it decodes."""
        return self.decodes if remaining_tokens == 1 else self.prompts


MIXED = Part(prompts=True, decodes=True)
PREFILL = Part(prompts=True, decodes=False)
DECODE = Part(prompts=False, decodes=True)


@dataclass(frozen=True, slots=True)
class Prospect:
    """What decoding on gives, and what a prefill phase would have to do."""

    decode_requests: float
    """Requests in a decode step now."""
    decode_step_s: float | None
    """Time of such a step on a stage; None while nothing is known of step times."""
    prefill_step_s: float | None
    """Time of a step of prompts only; None like the other."""
    prefill_steps: float
    """Such steps that there is work for: prompts that are admitted, or expected to be."""

    @property
    def decode_rate(self) -> float:
        """Tokens per second; per step while nothing is known of step times."""
        return self.decode_requests / (self.decode_step_s or 1.0)

    def switch_efficiency(self, num_slots: int) -> float:
        """Share of the coming prefill phase and its two switches that is not lost to these. While
        nothing is known of step times, a decode step is taken to be short."""
        prefill_s, decode_s = 1.0, 0.0
        if self.prefill_step_s is not None and self.decode_step_s is not None:
            prefill_s, decode_s = self.prefill_step_s, self.decode_step_s
        phase_s = self.prefill_steps * prefill_s
        lost_s = (num_slots - 1) * abs(prefill_s - decode_s)
        return phase_s / (phase_s + lost_s) if phase_s > 0 else 0.0


class Prefill(Protocol):
    """Asked before every step, and told of every one that was planned."""

    @property
    def peak_share(self) -> float:
        """Share of the blocks up to which requests are admitted, by their predicted peak use."""
        ...

    @property
    def prompts_ride(self) -> bool:
        """Whether steps that decode compute prompts as well."""
        ...

    @property
    def part(self) -> Part:
        """Who may take part now."""
        ...

    def begin(self, step: int, prospect: Callable[[], Prospect]) -> None:
        """A step is about to be planned."""
        ...

    def turn(self, is_idle: bool) -> bool:
        """Nobody who may take part can; `is_idle`: nor is any step in flight. True when others may
        now."""
        ...

    def planned(self, prompt_tokens: int, held_tokens: int) -> None:
        """A step with so many prompt tokens was planned; all blocks hold `held_tokens`."""
        ...


class MixedPrefill:
    """Prompts ride on decode steps."""

    peak_share = 1.0
    prompts_ride = True
    part = MIXED

    def begin(self, step: int, prospect: Callable[[], Prospect]) -> None:
        pass

    def turn(self, is_idle: bool) -> bool:
        return False

    def planned(self, prompt_tokens: int, held_tokens: int) -> None:
        pass


class PhasedPrefill:
    """Prefill phases and decode phases in turns."""

    peak_share = PEAK_SHARE
    prompts_ride = False

    def __init__(self, num_slots: int) -> None:
        """`num_slots` steps are a round; once in each it is asked whether decoding still pays."""
        self.part = PREFILL
        self._num_slots = num_slots
        self._best_rate = 0.0
        """Of decoding, since the last prefill phase."""
        self._prefilled_tokens = 0
        """In this prefill phase."""
        self._next_check = 0

    def begin(self, step: int, prospect: Callable[[], Prospect]) -> None:
        if self.part == PREFILL or step < self._next_check:
            return
        self._next_check = step + self._num_slots
        now = prospect()
        self._best_rate = max(self._best_rate, now.decode_rate)
        if now.decode_rate < self._best_rate * now.switch_efficiency(self._num_slots):
            self._enter(PREFILL)

    def turn(self, is_idle: bool) -> bool:
        if self.part == DECODE and not is_idle:
            return False  # those who decode are under way
        self._enter(DECODE if self.part == PREFILL else PREFILL)
        return True

    def planned(self, prompt_tokens: int, held_tokens: int) -> None:
        if self.part != PREFILL:
            return
        self._best_rate = 0.0  # the next decode phase begins anew, but not after an empty phase
        self._prefilled_tokens += prompt_tokens
        if self._prefilled_tokens >= held_tokens:
            self._enter(DECODE)

    def _enter(self, part: Part) -> None:
        self.part = part
        self._prefilled_tokens = 0
        self._next_check = 0


def make_prefill(name: str, num_slots: int) -> Prefill:
    """The rule called `name`: `mixed` or `phases`. Raises ConfigError for another name."""
    if name == "mixed":
        return MixedPrefill()
    if name == "phases":
        return PhasedPrefill(num_slots)
    raise ConfigError(f"--prefill {name}: choose mixed or phases")
