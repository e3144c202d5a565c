"""What the system is doing now, as one snapshot for `pipemax status` and /metrics."""

import itertools
import time
from collections.abc import Sequence
from typing import Literal

from pipemax.coordinator.assembly import Assembly, sampler_name, stage_name
from pipemax.coordinator.state import SchedulerState
from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.control import KvReport, LinkTotals, StageReady
from pipemax.proto.messages.ingest import (
    JobProgress,
    SamplerStatus,
    SlotStatus,
    StageStatus,
    Status,
)

_WAIT_KV = "wait_kv"
"""The stages' state for it."""


class StatusView:
    """Collects what the other processes report and reads the scheduler's own books.

    `latest` is replaced, never changed, so that the metrics thread may read it at any time.
    """

    def __init__(
        self, config: EngineConfig, instance_id: str, state: SchedulerState, assembly: Assembly
    ) -> None:
        self._config = config
        self._instance_id = instance_id
        self._state = state
        self._assembly = assembly
        self._started = time.monotonic()
        self._seconds: dict[str, dict[str, float]] = {}
        self._before: dict[str, dict[str, float]] = {}
        self._steps = [0] * config.pipeline_parallel_size
        self._sampled = dict.fromkeys(map(sampler_name, range(config.sampler_workers)), 0)
        """Rows, by sampler."""
        self._links: tuple[LinkTotals, ...] = ()
        self._links_before: tuple[LinkTotals, ...] = ()
        self._queued_load_bytes: tuple[int, ...] = ()
        self._waited_s = 0.0
        self.jobs: tuple[JobProgress, ...] = ()
        self.draining = False
        self.latest: Status | None = None

    def waited(self, seconds: float) -> None:
        """The coordinator waited so long for messages."""
        self._waited_s += seconds

    def stage_step(self, stage: int, seconds: dict[str, float]) -> float:
        """A stage finished a step; `seconds` by state are cumulative since its start. Returns the
        seconds in which it waited for KV since the last report."""
        self._steps[stage] += 1
        before = self._seconds.get(stage_name(stage), {}).get(_WAIT_KV, 0.0)
        self.stage_seconds(stage_name(stage), seconds)
        return max(0.0, seconds.get(_WAIT_KV, 0.0) - before)

    def stage_seconds(self, name: str, seconds: dict[str, float]) -> None:
        if not seconds:
            return
        known = self._seconds.get(name, {})
        if sum(seconds.values()) < sum(known.values()):  # the process was restarted
            before = self._before.setdefault(name, {})
            for state, value in known.items():
                before[state] = before.get(state, 0.0) + value
        self._seconds[name] = seconds

    def rows_sampled(self, name: str, count: int) -> None:
        self._sampled[name] += count

    def kv_report(self, report: KvReport) -> tuple[Sequence[int], Sequence[float]]:
        """Take the daemon's totals; returns what loads grew by since the last report, in bytes and
        seconds per stage."""
        if any(_is_behind(n, b) for n, b in zip(report.links, self._links, strict=False)):
            # The daemon was restarted and counts from zero again.
            self._links_before = _add(self._links_before, self._links)
            self._links = ()
        before = self._links or tuple(LinkTotals() for _ in report.links)
        self._links = report.links
        self._queued_load_bytes = report.queued_load_bytes
        pairs = list(zip(report.links, before, strict=True))
        return (
            [now.load_bytes - then.load_bytes for now, then in pairs],
            [now.load_seconds - then.load_seconds for now, then in pairs],
        )

    def refresh(self) -> Status:
        state, counters, blocks = self._state, self._state.counters, self._state.blocks
        links = _add(self._links_before, self._links)
        found, bandwidths = self._assembly.stages, state.budget.bandwidths_bytes_s
        uptime_s = time.monotonic() - self._started
        self.latest = Status(
            instance_id=self._instance_id,
            phase=self._phase(),
            model_name=self._config.served_model_name,
            uptime_s=uptime_s,
            requests_waiting=len(state.waiting),
            requests_running=len(state.running),
            requests_finished=counters.finished,
            preemptions=counters.preemptions,
            prompt_tokens=counters.prompt_tokens,
            prefix_query_tokens=counters.prefix_query_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            generation_tokens=counters.generation_tokens,
            recomputed_tokens=counters.recomputed_tokens,
            prefetched_tokens=counters.prefetched_tokens,
            context_tokens=counters.context_tokens,
            decode_context_tokens=counters.decode_context_tokens,
            decode_prefetched_tokens=counters.decode_prefetched_tokens,
            prefetch_budget_blocks=counters.prefetch_budget_blocks,
            prefetch_blocks=counters.prefetch_blocks,
            late_prefetches=counters.late_prefetches,
            device_blocks_total=blocks.num_blocks,
            device_blocks_used=blocks.num_blocks - blocks.num_free,
            host_blocks_total=state.num_host_blocks,
            host_blocks_used=state.host_used,
            load_bytes=sum(link.load_bytes for link in links),
            store_bytes=sum(link.store_bytes for link in links),
            load_seconds=sum(link.load_seconds for link in links),
            store_seconds=sum(link.store_seconds for link in links),
            epoch=self._assembly.epoch,
            missing=() if self._assembly.running else self._assembly.missing,
            stages=tuple(
                self._stage(i, name, links, found, bandwidths)
                for i, name in enumerate(map(stage_name, range(len(self._steps))))
            ),
            samplers=tuple(
                SamplerStatus(
                    sampler=index,
                    pid=self._assembly.peers[name].pid,
                    rows=rows,
                    state_seconds=self._all_seconds(name),
                )
                for index, (name, rows) in enumerate(self._sampled.items())
            ),
            slots=self._slots(),
            jobs=self.jobs,
            coordinator_busy_seconds=max(0.0, uptime_s - self._waited_s),
        )
        return self.latest

    def _phase(self) -> Literal["starting", "ready", "recovering", "draining"]:
        if not self._assembly.running:
            return "recovering" if self._state.epoch else "starting"
        return "draining" if self.draining else "ready"

    def _slots(self) -> tuple[SlotStatus, ...]:
        slots = [SlotStatus()] * self._config.num_slots
        for flight in self._state.in_flight.values():
            made_of = flight.features
            slots[flight.slot] = SlotStatus(
                requests=flight.num_items,
                context_tokens=made_of.context_tokens,
                prefill_tokens=made_of.prefill_tokens,
            )
        return tuple(slots)

    def _stage(
        self,
        index: int,
        name: str,
        links: Sequence[LinkTotals],
        found: Sequence[StageReady],
        bandwidths: Sequence[float],
    ) -> StageStatus:
        peer = self._assembly.peers[name]
        ready = next((r for r in found if r.stage == index), None)
        queued = self._queued_load_bytes
        return StageStatus(
            stage=index,
            pid=peer.pid,
            layers=ready.layers if ready else (0, 0),
            state_seconds=self._all_seconds(name),
            steps=self._steps[index],
            activation_transport=ready.activation_transport if ready else "",
            device=self._config.device_name(index),
            kv_copies="" if self._config.cuda is None else self._config.cuda.kv_copies,
            link=links[index] if index < len(links) else LinkTotals(),
            queued_load_bytes=queued[index] if index < len(queued) else 0,
            link_bandwidth_bytes_s=bandwidths[index] if index < len(bandwidths) else 0.0,
        )

    def _all_seconds(self, name: str) -> dict[str, float]:
        """By state, of the process and of those before it."""
        before = self._before.get(name)
        now = self._seconds.get(name, {})
        if before is None:
            return now
        return {s: now.get(s, 0.0) + before.get(s, 0.0) for s in now | before}


def _is_behind(now: LinkTotals, then: LinkTotals) -> bool:
    return now.load_bytes < then.load_bytes or now.store_bytes < then.store_bytes


def _add(one: Sequence[LinkTotals], other: Sequence[LinkTotals]) -> tuple[LinkTotals, ...]:
    if not one:
        return tuple(other)
    return tuple(
        LinkTotals(
            load_bytes=a.load_bytes + b.load_bytes,
            load_seconds=a.load_seconds + b.load_seconds,
            load_copies=a.load_copies + b.load_copies,
            store_bytes=a.store_bytes + b.store_bytes,
            store_seconds=a.store_seconds + b.store_seconds,
            store_copies=a.store_copies + b.store_copies,
        )
        for a, b in itertools.zip_longest(one, other, fillvalue=LinkTotals())
    )
