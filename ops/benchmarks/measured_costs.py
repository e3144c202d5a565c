"""From what live runs recorded to a file of measured costs for `pipemax simulate`, and what the
simulator makes of it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from live_system import Lengths

from pipemax.coordinator.cost_model import StageCost, StepFeatures
from pipemax.coordinator.tile_table import TILE_ROWS
from pipemax.proto.config import EngineConfig
from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.messages.ingest import Status
from pipemax.services.simulator import workload
from pipemax.services.simulator.measured import MeasuredStage, load_measured
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import measured_spec
from pipemax.services.simulator.world import simulate
from pipemax.services.tiny_model import ModelShape
from pipemax.stage_worker.modelled.roofline import StepLoad

_KNOT_ROWS = (1, 64, TILE_ROWS)
"""Rows of the first tile at which the cost model's table has values."""
_PROBE = 1_000_000


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds, medians of a run with one request at a time."""

    plan_s: float
    """From tokens at the coordinator to the next plan leaving it."""
    message_s: float
    """One message, or the news of activations; what is left when all else is subtracted."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One measured run; steps and plans as in `recording_coordinator.py`."""

    steps: list[list[float]]
    plans: list[list[float]]
    seconds: float
    """From the first submission to the last result."""
    before: Status
    after: Status
    latencies: Latencies
    config: EngineConfig

    @property
    def num_stages(self) -> int:
        return self.config.pipeline_parallel_size

    def samples(self, stage: int) -> list[tuple[StepFeatures, float]]:
        return [
            (StepFeatures(*(int(value) for value in step[2:6])), step[6])
            for step in self.steps
            if step[1] == stage and step[6] > 0
        ]

    def state_s(self, stage: int) -> dict[str, float]:
        """Seconds of the run by state."""
        return _grown_states(self.before, self.after, stage)

    def describe(self) -> str:
        """Where the time went, and what travelled."""
        before, after = self.before, self.after
        loaded = (after.load_bytes - before.load_bytes) / 1e6
        steps = after.stages[0].steps - before.stages[0].steps
        parts = [
            f"{steps} steps",
            f"{after.preemptions - before.preemptions} preemptions",
            f"{after.recomputed_tokens - before.recomputed_tokens} tokens recomputed",
            f"{loaded:.0f} MB loaded",
        ]
        for stage in range(self.num_stages):
            states = self.state_s(stage)
            total = sum(states.values())
            shares = ", ".join(f"{s} {v / total:.1%}" for s, v in states.items() if v > 0)
            parts.append(f"stage {stage}: {shares}")
        return "; ".join(parts)


def latencies(
    recorded: dict[str, Any], start_s: float, end_s: float, before: Status, after: Status
) -> Latencies:
    """Of a run with one request at a time between `start_s` and `end_s`: the time from token to
    token is what all stages compute, prepare and send, one hop to each further stage, one plan and
    two messages."""
    plans = [plan for plan in recorded["plans"] if start_s <= plan[0] <= end_s]
    steps = [step for step in recorded["steps"] if start_s <= step[0] <= end_s]
    decodes = [step for step in steps if step[2] and not step[4]]
    num_stages = len(after.stages)
    periods = [late[0] - early[0] for early, late in pairwise(plans[1:])]
    beside = statistics.median(periods)
    for stage in range(num_stages):
        beside -= statistics.median(step[6] for step in decodes if step[1] == stage)
        states = _grown_states(before, after, stage)
        count = after.stages[stage].steps - before.stages[stage].steps
        beside -= (states["prepare"] + states["send"]) / count
    plan_s = statistics.median(seconds for _, seconds in plans if seconds)
    return Latencies(plan_s, max(0.0, beside - plan_s) / (num_stages + 1))


def _grown_states(before: Status, after: Status, stage: int) -> dict[str, float]:
    then, now = before.stages[stage].state_seconds, after.stages[stage].state_seconds
    return {state: seconds - then.get(state, 0.0) for state, seconds in now.items()}


def measured_system(
    description: str,
    own: Sequence[Recording],
    recordings: Sequence[Recording],
    shape: ModelShape,
) -> dict[str, Any]:
    """The file's object: pools, overheads and link of the `own` runs, step costs of `recordings`,
    whose stages must be alike. Of the times between processes, those of the run itself where it
    says them: with more requests a plan takes longer."""
    first = own[0]
    after = first.after
    return {
        "format": "pipemax-measured-1",
        "description": description,
        "model": f"{shape.num_layers} layers of {shape.hidden_size}",
        "block_size": first.config.block_size,
        "num_device_blocks": after.device_blocks_total,
        "num_host_blocks": after.host_blocks_total,
        "stages": [_stage(stage, own, recordings, shape) for stage in range(first.num_stages)],
        "message_s": statistics.median(r.latencies.message_s for r in own),
        "hop_s": statistics.median(r.latencies.message_s for r in own),
        "plan_s": statistics.median(s for r in own for _, s in r.plans if s),
    }


def _stage(
    stage: int, own: Sequence[Recording], recordings: Sequence[Recording], shape: ModelShape
) -> dict[str, Any]:
    config = own[0].config
    layers = config.layer_split[stage]
    geometry = BlockGeometry(
        layers, config.block_size, shape.num_kv_heads, shape.head_dim, shape.dtype
    )
    overheads = []
    for recording in own:
        states = recording.state_s(stage)
        steps = recording.after.stages[stage].steps - recording.before.stages[stage].steps
        overheads.append((states["prepare"] + states["send"]) / steps)
    result = {"num_layers": layers, "block_bytes": geometry.block_bytes}
    result |= step_costs(samples_of(recordings, stage))
    result["overhead_s"] = statistics.median(overheads)
    return result | _link(own)


def samples_of(recordings: Sequence[Recording], stage: int) -> list[tuple[StepFeatures, float]]:
    return [sample for recording in recordings for sample in recording.samples(stage)]


def jitter(system: dict[str, Any], recordings: Sequence[Recording]) -> float:
    """Standard deviation of steps' times around what `system` says, as a share of it; what the
    simulator takes at most, if more."""
    off: list[float] = []
    for index, stage in enumerate(system["stages"]):
        costs = msgspec.convert(stage, MeasuredStage)
        for features, seconds in samples_of(recordings, index):
            load = StepLoad(
                features.decode_requests,
                features.context_tokens,
                features.prefill_tokens,
                features.prefill_pairs,
            )
            off.append(seconds / costs.step_s(load) - 1)
    return min(0.5, statistics.pstdev(off))


def step_costs(samples: Sequence[tuple[StepFeatures, float]]) -> dict[str, Any]:
    """The cost model of the samples, read off its predictions. It fits relative errors, which
    weighs slow steps less than fast ones, so it is scaled to the samples' total time."""
    cost = StageCost()
    cost.fit(samples)

    def seconds(requests: int, context: int = 0, prompt: int = 0, pairs: int = 0) -> float:
        predicted = cost.predict(StepFeatures(requests, context, prompt, pairs))
        assert predicted is not None
        return predicted

    predicted = sum(cost.predict(features) or 0.0 for features, _ in samples)
    scale = sum(measured for _, measured in samples) / predicted
    fixed = seconds(0)  # of no row and of one the table's factor is the same
    per_request = seconds(1) - fixed
    most_rows = max(features.rows for features, _ in samples)
    rows = [
        first + knot for first in range(0, most_rows + TILE_ROWS, TILE_ROWS) for knot in _KNOT_ROWS
    ]
    return {
        "fixed_s": scale * fixed,
        "per_request_s": scale * per_request,
        "per_context_token_s": scale * (seconds(1, _PROBE) - seconds(1)) / _PROBE,
        "per_prompt_token_s": scale * (seconds(0, 0, 1) - fixed),
        "per_prompt_pair_s": scale * (seconds(1, 0, 0, _PROBE) - seconds(1)) / _PROBE,
        "rows_factors": [[r, seconds(r) / (fixed + per_request * r)] for r in rows],
    }


def _link(own: Sequence[Recording]) -> dict[str, float]:
    """Bytes per second while a copy was under way; all links are alike."""

    def rate(what: str) -> float:
        size = sum(getattr(r.after, f"{what}_bytes") - getattr(r.before, f"{what}_bytes")
                   for r in own)  # fmt: skip
        seconds = sum(getattr(r.after, f"{what}_seconds") - getattr(r.before, f"{what}_seconds")
                      for r in own)  # fmt: skip
        return size / seconds if seconds else 0.0

    load, store = rate("load"), rate("store")
    return {"load_bytes_s": load, "store_bytes_s": store} if load and store else {}


def simulated(
    measured: Path, work: Sequence[Lengths], config: EngineConfig, compute_jitter: float
) -> Result:
    """The run of a system as configured with the costs of the file `measured`: `simulated_s` are
    virtual seconds from the submission of all requests to the last result."""
    requests = tuple(
        workload.Lengths(one.prompt_tokens, one.output_tokens, max_tokens=one.output_tokens)
        for one in work
    )
    spec = measured_spec(load_measured(measured), workload.Workload("live", requests))
    spec = replace(
        spec,
        timing=replace(spec.timing, load_s=0.0, compute_jitter=compute_jitter),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        policy=config.policy,
    )
    return simulate(spec)
