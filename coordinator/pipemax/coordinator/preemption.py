"""Making room when nothing moves, or a slot stands empty because nobody finds a block."""

from pipemax.coordinator.cost_model import StepFeatures
from pipemax.coordinator.events import Command, ToDaemon
from pipemax.coordinator.request import NO_STEP, Request
from pipemax.coordinator.state import SchedulerState
from pipemax.proto.errors import InvariantError


class Preemption:
    """Parks a request on the host or sends it back to be recomputed, whichever costs less. The
    oldest is never preempted, so it finishes, and with it everybody."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state

    def free_blocks(self) -> list[Command] | None:
        """None when there is no need; otherwise what to tell the daemon. Planning should then be
        tried again."""
        if self._is_stuck():
            return self._preempt()
        return self._relieve()

    def _is_stuck(self) -> bool:
        """No event is on its way that could change anything, and there is work."""
        state = self._state
        coming = state.in_flight or state.releasing or state.num_storing
        return not coming and bool(state.running or state.waiting)

    def _preempt(self) -> list[Command]:
        state = self._state
        requests = sorted(state.running.values(), key=lambda r: r.key)
        if len(requests) < 2:
            raise InvariantError("the only request left cannot run although nothing else does")
        if not self._cheaper_to_recompute(requests[-1]):
            for request in reversed(requests[1:]):
                if request.staged_for == NO_STEP and state.evict(request):
                    return []
        return self.recompute_later(requests[-1])

    def _relieve(self) -> list[Command] | None:
        """When a slot stands empty only because nobody finds a block, take those of the newest that
        is idle and on the device: to wait until somebody finishes would cost the slot's share of
        all throughput."""
        state = self._state
        coming = state.releasing or state.num_storing or state.staged_step != NO_STEP
        if coming or state.blocks.num_free or not state.rosters.resident:
            return None
        if len(state.in_flight) == state.limits.num_slots:
            return None
        whole = [r for r in state.running.values() if r.is_device_complete and not r.in_flight]
        newest = max(whole, key=lambda r: r.key)
        if newest.key == min(state.running):
            return None
        if self._cheaper_to_recompute(newest) or not state.evict(newest):
            return self.recompute_later(newest)
        return []

    def recompute_later(self, request: Request) -> list[Command]:
        release = self._state.forget_kv(request)
        self._state.counters.preemptions += 1
        self._state.waiting.put_first(request)
        return [ToDaemon(release)] if release else []

    def _cheaper_to_recompute(self, request: Request) -> bool:
        """Than to bring its blocks back. False while either is unknown: what is stored is kept."""
        state = self._state
        tokens, rate = request.planned, state.budget.blocks_per_s
        prefill = StepFeatures(0, 0, tokens, tokens * (tokens + 1) // 2)
        slowest = state.costs.slowest(prefill)
        seconds = slowest.predict_anywhere(prefill) if slowest else None
        if seconds is None or not rate or request.staged_for != NO_STEP:
            return False
        return seconds < len(request.table) / rate
