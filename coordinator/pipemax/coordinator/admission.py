"""Which waiting requests start to run: those whose growth has room, in order of service."""

from pipemax.coordinator.phases import MixedPrefill, Prefill
from pipemax.coordinator.policy import OffloadOutlook, SelectionPolicy
from pipemax.coordinator.request import Request
from pipemax.coordinator.state import SchedulerState
from pipemax.proto.errors import InvariantError
from pipemax.proto.geometry import blocks_for

TAIL_SHARE = 0.25
"""Most of the device pool that the tails of offloaded requests may take: tails never leave it."""


class Admission:
    def __init__(
        self, state: SchedulerState, policy: SelectionPolicy, prefill: Prefill | None = None
    ) -> None:
        """Without a `prefill`, prompts are mixed into decode steps."""
        prefill = prefill or MixedPrefill()
        self._state = state
        self._policy = policy
        self._peak_share = prefill.peak_share
        self._prompts_ride = prefill.prompts_ride

    def admit(self, now: float) -> None:
        """Start requests from the head of the queue, each with device blocks for its prompt."""
        state = self._state
        while (request := self._next()) is not None and self._has_room(request):
            if state.running and not self.is_expected_to_fit(request):
                return
            del state.waiting[request.key]
            state.admit(request, now)
            blocks = state.blocks.take_for_write(self._prompt_blocks(request))
            if blocks is None:
                raise InvariantError("admitted a request without device blocks for it")
            state.extend_table(request, blocks)

    def wanted_blocks(self) -> int:
        """Device blocks to make free for the next request that waits: none when there is none, or
        when it would not be admitted anyway."""
        request = self._next()
        if request is None or not self.is_expected_to_fit(request):
            return 0
        return self._prompt_blocks(request)

    def is_expected_to_fit(self, request: Request) -> bool:
        """Whether device and host hold what is expected of all at their worst moment."""
        peak = self._state.forecast.peak_blocks(request)
        return (
            peak <= self._peak_share * self._state.blocks.num_blocks
            or peak <= self._peak_share * self._worthwhile_blocks()
        )

    def expected_tokens(self) -> int:
        """Prompt tokens of those who wait and are expected to fit, by their prompts and half the
        outputs that such prompts had of late."""
        state = self._state
        room = self._peak_share * self._worthwhile_blocks() - state.forecast.peak_blocks()
        per_output = state.forecast.prefill_per_output
        grown = 1.0 + (0.5 / per_output if per_output else 0.0)
        tokens = 0
        for request in state.waiting.values():
            room -= grown * len(request.tokens) / state.limits.block_size
            if room < 0:
                break
            tokens += len(request.tokens)
        return tokens

    def _worthwhile_blocks(self) -> int:
        """The device's blocks, and as many of the host's as the policy finds worth using."""
        state = self._state
        on_device = state.blocks.num_blocks
        if not state.num_host_blocks or len(state.running) >= TAIL_SHARE * on_device:
            return on_device
        worth = self._policy.worth_offloading(self._outlook())
        return on_device + min(state.num_host_blocks, worth)

    def _has_room(self, request: Request) -> bool:
        """Room on the device for the prompt now. Newcomers must neither take the blocks that those
        who run need next nor keep out for ever who waits longest on the host."""
        state = self._state
        room = state.blocks.num_free - self._prompt_blocks(request) - state.growth_reserve
        return room >= 0 and room >= self._longest_wait_blocks()

    def _longest_wait_blocks(self) -> int:
        waiting = self._state.rosters.on_host.values()
        return min(waiting, key=lambda c: (c.last_turn, c.key)).load_blocks if waiting else 0

    def _outlook(self) -> OffloadOutlook:
        state = self._state
        return OffloadOutlook(
            device_blocks=state.blocks.num_blocks,
            num_slots=state.limits.num_slots,
            block_size=state.limits.block_size,
            request_blocks=state.total_blocks / max(1, len(state.running)),
            prefill_per_output=state.forecast.prefill_per_output if self._prompts_ride else 0.0,
            blocks_per_s=state.budget.blocks_per_s,
            costs=state.costs,
        )

    def _next(self) -> Request | None:
        return next(iter(self._state.waiting.values()), None)

    def _prompt_blocks(self, request: Request) -> int:
        return blocks_for(len(request.tokens), self._state.limits.block_size)
