"""What a simulated run is remembered by: samples over time, the steady phase, the final figures."""

from collections.abc import Callable, Sequence

from pipemax.services.simulator.coordinator import ModelledCoordinator
from pipemax.services.simulator.engine import NS, EventLoop, to_ns
from pipemax.services.simulator.links import Link
from pipemax.services.simulator.records import Interval, Result, Sample, StageFigures, Timeline
from pipemax.services.simulator.spec import SimulationSpec
from pipemax.services.simulator.stage import ModelledStage

Mark = tuple[int, int, list[dict[str, int]]]
"""A moment: nanoseconds, output tokens so far, nanoseconds by state of each stage."""


class Recorder:
    """Looks at the parts of a World; changes none of them."""

    def __init__(
        self,
        spec: SimulationSpec,
        loop: EventLoop,
        coordinator: ModelledCoordinator,
        stages: Sequence[ModelledStage],
        links: Sequence[Link],
        intervals: list[Interval],
        on_progress: Callable[[float, int], None] | None,
    ) -> None:
        self._spec = spec
        self._loop = loop
        self._coordinator = coordinator
        self._stages = stages
        self._links = links
        self._intervals = intervals
        self._on_progress = on_progress
        self._timeline = Timeline(0.25)
        self._steady_from: Mark | None = None
        self._steady_to: Mark | None = None

    def start(self) -> None:
        """Samples from now on, and lets the steady phase begin behind the warm-up."""
        self._loop.at(to_ns(self._spec.warm_up_s), self._begin_steady)
        self._sample()

    def after_event(self) -> None:
        """The coordinator handled an event: the steady phase ends when nobody waits any more."""
        waiting = self._coordinator.scheduler.state.waiting
        if self._steady_from and not self._steady_to and not waiting:
            self._steady_to = self._steady_mark()

    def _begin_steady(self) -> None:
        if self._coordinator.scheduler.state.waiting:
            self._steady_from = self._steady_mark()

    def _steady_mark(self) -> Mark:
        now_ns = self._loop.now_ns
        for stage in self._stages:
            stage.record.switch(stage.record.state, now_ns)
        states = [dict(stage.record.spent_ns) for stage in self._stages]
        tokens = self._coordinator.scheduler.state.counters.generation_tokens
        return now_ns, tokens, states

    def _sample(self) -> None:
        state = self._coordinator.scheduler.state
        size = self._spec.block_size
        held = state.blocks.num_blocks - state.blocks.num_free
        self._timeline.add(
            Sample(
                self._loop.now,
                held * size,
                state.host_used * size,
                len(state.running),
                len(state.waiting),
                state.counters.generation_tokens,
                state.counters.prompt_tokens,
            )
        )
        if self._on_progress is not None:
            self._on_progress(self._loop.now, len(self._coordinator.outputs))
        if not self._loop.is_idle:
            self._loop.after(to_ns(self._timeline.every_s), self._sample)

    def result(self) -> Result:
        """Of the run up to now."""
        spec = self._spec
        counters = self._coordinator.scheduler.state.counters
        now_ns = self._loop.now_ns
        end = self._steady_mark()
        steady_s, steady_tokens = 0.0, 0
        steady_states: list[dict[str, float]] = []
        if self._steady_from:
            since, until = self._steady_from, self._steady_to or end
            steady_s = (until[0] - since[0]) / NS
            steady_tokens = until[1] - since[1]
            steady_states = [
                {state: (after[state] - before[state]) / NS for state in after}
                for before, after in zip(since[2], until[2], strict=True)
            ]
        return Result(
            simulated_s=self._loop.now,
            num_events=self._loop.num_events,
            num_requests=len(spec.workload.requests),
            finished=len(self._coordinator.outputs),
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            recomputed_tokens=counters.recomputed_tokens,
            preemptions=counters.preemptions,
            prefetched_tokens=counters.prefetched_tokens,
            context_tokens=counters.context_tokens,
            late_prefetches=counters.late_prefetches,
            num_device_blocks=spec.num_device_blocks,
            num_host_blocks=spec.num_host_blocks,
            block_size=spec.block_size,
            stages=[self._figures(index) for index in range(spec.num_gpus)],
            start_s=min(now_ns, self._coordinator.first_ready_ns or now_ns) / NS,
            steady_s=steady_s,
            steady_generation_tokens=steady_tokens,
            steady_state_s=steady_states,
            timeline=self._timeline.samples,
            intervals=self._intervals,
            outputs=dict(self._coordinator.outputs),
            finished_at_s=self._coordinator.finished_at_s,
        )

    def _figures(self, index: int) -> StageFigures:
        load_bytes, load_ns, _ = self._links[index].totals["load"]
        store_bytes, store_ns, _ = self._links[index].totals["store"]
        spent = self._stages[index].record.spent_ns
        return StageFigures(
            {state: ns / NS for state, ns in spent.items()},
            load_bytes,
            store_bytes,
            load_ns / NS,
            store_ns / NS,
        )
