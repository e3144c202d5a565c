"""What holds the pipeline up: one place, and what it spends its time on.

In a pipeline one slow place makes all others wait, so most bubbles are consequences. `wait_plan`
and `wait_activation` say that the cause is elsewhere; all other states are a stage's own. Whoever
spends most of its time on its own is what the others wait for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from pipemax.proto.messages.ingest import Status
from pipemax.proto.states import STATES

ELSEWHERE = frozenset({"wait_plan", "wait_activation"})
"""States whose cause is not the stage's own."""
MOST = 0.5
"""Of its time: who spends more holds the others up."""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    where: str
    """`stage 1`, `coordinator`, `sampler 0`, `stage 0 to stage 1`."""
    state: str
    """Of a stage or a sampler, `busy` of the coordinator."""
    share: float
    """Of its time."""


def bottleneck(before: Status, after: Status) -> Bottleneck | None:
    """Between two looks at one instance of a system. None when nothing ran, or no place stands out:
    there is less work than would fill the pipeline."""
    span_s = after.uptime_s - before.uptime_s
    if before.instance_id != after.instance_id or span_s <= 0 or not after.requests_running:
        return None
    stages = [_shares(now, then) for now, then in _stages(before, after)]
    return (
        _fullest_stage(stages)
        or _busy_coordinator(before, after, span_s)
        or _busy_sampler(before, after)
        or _slow_hop(stages)
    )


def _fullest_stage(stages: list[Mapping[str, float]]) -> Bottleneck | None:
    own = [sum(share for s, share in one.items() if s not in ELSEWHERE) for one in stages]
    fullest = max(range(len(own)), key=lambda index: own[index], default=None)
    if fullest is None or own[fullest] < MOST:
        return None
    candidates = [state for state in STATES if state not in ELSEWHERE]
    state = max(candidates, key=lambda name: stages[fullest].get(name, 0.0))
    return Bottleneck(f"stage {fullest}", state, stages[fullest][state])


def _busy_coordinator(before: Status, after: Status, span_s: float) -> Bottleneck | None:
    share = (after.coordinator_busy_seconds - before.coordinator_busy_seconds) / span_s
    return Bottleneck("coordinator", "busy", share) if share >= MOST else None


def _busy_sampler(before: Status, after: Status) -> Bottleneck | None:
    then = {(one.sampler, one.pid): one.state_seconds for one in before.samplers}
    for one in after.samplers:
        share = _shares(one.state_seconds, then.get((one.sampler, one.pid), {})).get("sample", 0.0)
        if share >= MOST:
            return Bottleneck(f"sampler {one.sampler}", "sample", share)
    return None


def _slow_hop(stages: list[Mapping[str, float]]) -> Bottleneck | None:
    """Rows are long on their way: behind it stages wait for them, before it none does."""
    for index, (one, following) in enumerate(pairwise(stages)):
        share = following.get("wait_activation", 0.0)
        if share >= MOST > one.get("wait_activation", 0.0):
            return Bottleneck(f"stage {index} to stage {index + 1}", "wait_activation", share)
    return None


def _stages(before: Status, after: Status) -> list[tuple[Mapping[str, float], Mapping[str, float]]]:
    then = {(stage.stage, stage.pid): stage.state_seconds for stage in before.stages}
    return [(one.state_seconds, then.get((one.stage, one.pid), {})) for one in after.stages]


def _shares(now: Mapping[str, float], then: Mapping[str, float]) -> Mapping[str, float]:
    grown = {state: value - then.get(state, 0.0) for state, value in now.items()}
    total = sum(grown.values())
    return {state: value / total for state, value in grown.items()} if total > 0 else {}
