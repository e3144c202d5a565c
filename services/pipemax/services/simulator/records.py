"""What a run leaves behind: time by state, bytes moved, KV residency over time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pipemax.proto.states import STATES
from pipemax.services.simulator.engine import NS

STAGE_STATES: Final = (*STATES, "down")
"""The real stages' states, and the time in which a crashed one is not there."""
_MAX_SAMPLES = 1200


@dataclass(frozen=True, slots=True)
class Sample:
    """The system at one moment. KV in tokens' worth of blocks."""

    at_s: float
    device_tokens: int
    host_tokens: int
    running: int
    waiting: int
    generation_tokens: int
    prompt_tokens: int


class Timeline:
    """Samples at even distances, thinned whenever they become too many."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self.samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        if len(self.samples) >= _MAX_SAMPLES:
            del self.samples[1::2]
            self.every_s *= 2


@dataclass(frozen=True, slots=True)
class Interval:
    """A stage was in `state` for this long."""

    stage: int
    state: str
    start_s: float
    end_s: float


class StateRecord:
    """A stage's time by state, in whole nanoseconds: the states sum to the simulated time."""

    def __init__(self, stage: int, window_ns: tuple[int, int], intervals: list[Interval]) -> None:
        self.state = "wait_plan"
        self.spent_ns = dict.fromkeys(STAGE_STATES, 0)
        self._stage = stage
        self._since_ns = 0
        self._window_ns = window_ns
        self._intervals = intervals

    def switch(self, state: str, now_ns: int) -> None:
        """From now on time belongs to `state`."""
        if now_ns > self._since_ns:
            self.spent_ns[self.state] += now_ns - self._since_ns
            start = max(self._since_ns, self._window_ns[0])
            end = min(now_ns, self._window_ns[1])
            if start < end:
                self._intervals.append(Interval(self._stage, self.state, start / NS, end / NS))
            self._since_ns = now_ns
        self.state = state


@dataclass(slots=True)
class StageFigures:
    """One stage of a finished run."""

    state_s: dict[str, float]
    """Sums to `simulated_s`."""
    load_bytes: int
    store_bytes: int
    load_busy_s: float
    store_busy_s: float


@dataclass(slots=True)
class Result:
    """A finished run. Rates per second of simulated time."""

    simulated_s: float
    num_events: int
    num_requests: int
    finished: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    recomputed_tokens: int
    preemptions: int
    prefetched_tokens: int
    context_tokens: int
    late_prefetches: int
    num_device_blocks: int
    num_host_blocks: int
    block_size: int
    stages: list[StageFigures]
    start_s: float
    """Until the system was whole for the first time: rates and bubbles count from then on."""
    steady_s: float
    """Length of the window after the warm-up in which requests were still waiting for admission."""
    steady_generation_tokens: int
    steady_state_s: list[dict[str, float]] = field(default_factory=list)
    """By stage, within that window."""
    timeline: Sequence[Sample] = ()
    intervals: Sequence[Interval] = ()
    outputs: dict[int, int] = field(default_factory=dict)
    """Output tokens by request key."""
    finished_at_s: Sequence[float] = ()
    """When each request finished, in order."""

    @property
    def working_s(self) -> float:
        """Time since the start; next to nothing if the run ended before."""
        return max(self.simulated_s - self.start_s, 1e-9)

    def state_s_since_start(self, stage: StageFigures) -> dict[str, float]:
        """A stage's time by state without the start, in which it had no plan or was down."""
        states = dict(stage.state_s)
        left_s = self.start_s
        for state in ("wait_plan", "down"):
            taken_s = min(left_s, states[state])
            states[state] -= taken_s
            left_s -= taken_s
        return states

    @property
    def output_tokens_per_s(self) -> float:
        return self.generation_tokens / self.working_s

    @property
    def tokens_per_s(self) -> float:
        """Prompt and output."""
        return (self.prompt_tokens + self.generation_tokens) / self.working_s

    @property
    def requests_per_s(self) -> float:
        return self.finished / self.working_s

    def finishing_requests_per_s(self, first: float, last: float) -> float:
        """Requests that finished per second, from when the share `first` of all had finished to
        when `last` had: leaves out how a batch begins and ends."""
        number, until = (round(share * self.num_requests) for share in (first, last))
        finished = self.finished_at_s
        if not 0 <= number < until <= len(finished) or finished[until - 1] <= finished[number]:
            return 0.0
        return (until - 1 - number) / (finished[until - 1] - finished[number])

    @property
    def steady_tokens_per_s(self) -> float:
        """Output tokens per second in the steady window; 0 when there was none."""
        return self.steady_generation_tokens / self.steady_s if self.steady_s else 0.0

    @property
    def bubble_share(self) -> float:
        """Share of all stages' time since the start that was not compute."""
        computing = sum(stage.state_s["compute"] for stage in self.stages)
        return 1 - computing / (len(self.stages) * self.working_s)

    @property
    def steady_bubble_share(self) -> float:
        """The same within the steady window."""
        return _bubble(self.steady_state_s)


def _bubble(states: Sequence[dict[str, float]]) -> float:
    total = sum(sum(state.values()) for state in states)
    return 1 - sum(state["compute"] for state in states) / total if total else 0.0
