"""What a run of a peer's model leaves behind, in the simulator's own terms."""

import math
from collections.abc import Sequence

from pipemax.services.simulator.peers.jobs import Job, Part, Pool
from pipemax.services.simulator.records import STAGE_STATES, Result, Sample, StageFigures, Timeline
from pipemax.services.simulator.spec import SimulationSpec


class Ledger:
    """Clock, counters and time by state. Of the states, models of peers know `compute`, `send`
    (all-reduces) and `prepare` (re-sharding); the rest of the time is waiting."""

    def __init__(
        self,
        spec: SimulationSpec,
        num_device_blocks: int,
        num_host_blocks: int,
        has_steady_state: bool = True,
    ) -> None:
        """`has_steady_state`: output flows while requests wait; without it there are no such
        figures."""
        self.now_s = 0.0
        self.steps = 0
        self.preemptions = 0
        self.recomputed_tokens = 0
        self.load_bytes = 0.0
        """Per GPU; `store_bytes` likewise."""
        self.store_bytes = 0.0
        self.outputs: dict[int, int] = {}
        self._spec = spec
        self._has_steady_state = has_steady_state
        self._blocks = (num_device_blocks, num_host_blocks)
        self._generated = self._prompts = self._context = 0
        self._timeline = Timeline(0.25)
        self._busy_s = [dict.fromkeys(STAGE_STATES, 0.0) for _ in range(spec.num_gpus)]
        self._steady: list[tuple[float, int, list[dict[str, float]]]] = []

    @property
    def over(self) -> bool:
        """The horizon is reached or as many requests have finished as the spec asks for."""
        total = math.ceil(self._spec.stop_when_finished * len(self._spec.workload.requests))
        return len(self.outputs) >= total or self.now_s >= self._spec.horizon_s

    def spend(self, stage: int, state: str, seconds: float) -> None:
        self._busy_s[stage][state] += seconds

    def advance(self, parts: Sequence[Part], end_s: float, pool: Pool) -> list[Job]:
        """A step has ended at `end_s`. Returns its requests that go on; those that finished gave
        their blocks back."""
        self.now_s = max(self.now_s, end_s)
        self.steps += 1
        going_on = []
        for job, tokens in parts:
            self._context += job.computed + tokens
            job.computed += tokens
            if not job.missing:
                self._prompts += 0 if job.generated else job.prompt_tokens
                self._generated += 1
                job.generated += 1
            if job.finished:
                self.outputs[job.key] = job.generated
                pool.give_back(job)
            else:
                going_on.append(job)
        return going_on

    def recompute(self, job: Job, pool: Pool) -> None:
        """Preempts a request: its KV is gone, its tokens stay."""
        self.preemptions += 1
        self.recomputed_tokens += job.computed
        job.computed = 0
        pool.give_back(job)

    def note(self, waiting: int, running: int, device_blocks: int, host_blocks: int = 0) -> None:
        """The system as it is now, kept for the timeline and the steady figures."""
        last = self._timeline.samples[-1].at_s if self._timeline.samples else -1e9
        if self.now_s - last >= self._timeline.every_s:
            size = self._spec.block_size
            kv = (device_blocks * size, host_blocks * size)
            counts = (running, waiting, self._generated, self._prompts)
            self._timeline.add(Sample(self.now_s, *kv, *counts))
        begun = len(self._steady)
        starts = self._has_steady_state and begun == 0 and waiting > 0
        starts = starts and self.now_s >= self._spec.warm_up_s
        if starts or (begun == 1 and not waiting):
            self._mark()

    def result(self) -> Result:
        spec, end_s = self._spec, self.now_s
        if len(self._steady) == 1:
            self._mark()
        steady_s, steady_tokens, steady_states = self._steady_figures()
        return Result(
            simulated_s=end_s,
            num_events=self.steps,
            num_requests=len(spec.workload.requests),
            finished=len(self.outputs),
            steps=self.steps,
            prompt_tokens=self._prompts,
            generation_tokens=self._generated,
            recomputed_tokens=self.recomputed_tokens,
            preemptions=self.preemptions,
            prefetched_tokens=0,
            context_tokens=self._context,
            late_prefetches=0,
            num_device_blocks=self._blocks[0],
            num_host_blocks=self._blocks[1],
            block_size=spec.block_size,
            stages=[self._figures(busy) for busy in self._busy_s],
            start_s=0.0,
            steady_s=steady_s,
            steady_generation_tokens=steady_tokens,
            steady_state_s=steady_states,
            timeline=self._timeline.samples,
            outputs=self.outputs,
        )

    def _mark(self) -> None:
        busy = [dict(states) for states in self._busy_s]
        self._steady.append((self.now_s, self._generated, busy))

    def _steady_figures(self) -> tuple[float, int, list[dict[str, float]]]:
        if not self._steady:
            return 0.0, 0, []
        (since_s, before, busy), (until_s, after, later) = self._steady
        spent_s = until_s - since_s
        states = []
        for old, new in zip(busy, later, strict=True):
            grown = {state: new[state] - old[state] for state in new}
            states.append(_with_waiting(grown, spent_s))
        return spent_s, after - before, states

    def _figures(self, busy: dict[str, float]) -> StageFigures:
        load, store = round(self.load_bytes), round(self.store_bytes)
        rate = self._spec.full_link_bytes_s
        states = _with_waiting(busy, self.now_s)
        return StageFigures(states, load, store, load / rate, store / rate)


def _with_waiting(busy: dict[str, float], total_s: float) -> dict[str, float]:
    """What is not accounted for is waiting."""
    return busy | {"wait_plan": max(0.0, total_s - sum(busy.values()))}
