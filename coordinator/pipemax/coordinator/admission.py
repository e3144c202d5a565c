"""Which waiting requests start to run: those whose growth has room, in order of service."""

from pipemax.coordinator import sharing
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
            blocks = state.blocks.take_for_write(self._prompt_blocks(request))
            if blocks is None:
                raise InvariantError("admitted a request without device blocks for it")
            state.waiting.remove(request.key)
            state.admit(request, now)
            sharing.give_prompt(state, request, blocks)

    def wanted_blocks(self) -> int:
        """Device blocks to make free for the next request that waits: none when there is none, or
        when it would not be admitted anyway."""
        request = self._next()
        if request is None or not self.is_expected_to_fit(request):
            return 0
        return self._prompt_blocks(request)

    def is_expected_to_fit(self, request: Request) -> bool:
        """Whether the device holds what is expected of all at their worst moment; or, where the
        host takes what grows beyond it, whether both do, and what runs now is worth holding."""
        state = self._state
        on_device = state.blocks.num_blocks
        most = state.forecast.most_blocks + state.forecast.most_blocks_of(request)
        if most <= self._peak_share * on_device:
            return True  # whatever the forecast: it is costly, and asked for with every request
        peak = state.expected_peak(request)
        if peak <= self._peak_share * on_device:
            return True
        worth = self._worth_offloading()
        if worth is None or peak > self._peak_share * (on_device + state.num_host_blocks):
            return False
        # In the mean over their lives they hold about half of what they will grow by.
        held = (state.total_blocks + self._prompt_blocks(request) + peak) / 2
        return held <= self._peak_share * (on_device + worth)

    def offloads(self) -> bool:
        """Whether requests are admitted beyond what the device holds."""
        return self._worth_offloading() is not None

    def expected_tokens(self) -> int:
        """Prompt tokens of those who wait and are expected to fit, by their prompts and half the
        outputs that such prompts had of late."""
        state = self._state
        worth = self._worth_offloading()
        room = self._peak_share * (state.blocks.num_blocks + (worth or 0))
        room -= state.expected_peak()
        per_output = state.forecast.prefill_per_output
        grown = 1.0 + (0.5 / per_output if per_output else 0.0)
        tokens = 0
        for length in state.waiting.lengths():
            room -= grown * length / state.limits.block_size
            if room < 0:
                break
            tokens += length
        return tokens

    def _worth_offloading(self) -> int | None:
        """Blocks to hold beyond the device pool; None: requests should fit into it."""
        state = self._state
        full_of_tails = len(state.running) >= TAIL_SHARE * state.blocks.num_blocks
        if not state.num_host_blocks or full_of_tails:
            return None
        worth = self._policy.worth_offloading(self._outlook())
        return None if worth is None else min(state.num_host_blocks, worth)

    def _share_in_use(self) -> float:
        """Of the room that is kept for those who run. In the mean over a life at least half of what
        a request comes to: when all have just begun, less is no sign of what it will be."""
        state = self._state
        return min(1.0, max(0.5, state.total_blocks / max(1.0, state.expected_peak())))

    def _has_room(self, request: Request) -> bool:
        """Room on the device for the prompt now. Newcomers must neither take the blocks that those
        who run need next nor keep out for ever who waits longest on the host."""
        state = self._state
        room = state.blocks.num_free - self._prompt_blocks(request) - state.growth_reserve
        return room >= 0 and room >= self._longest_wait_blocks()

    def _longest_wait_blocks(self) -> int:
        waiting = self._state.rosters.on_host.columns()
        return int(waiting.load_blocks[waiting.by_wait()[0]]) if len(waiting) else 0

    def _outlook(self) -> OffloadOutlook:
        state = self._state
        prefill_per_output = 0.0
        if self._prompts_ride:
            prefill_per_output = state.forecast.prefill_per_output_so_far
        return OffloadOutlook(
            device_blocks=state.blocks.num_blocks,
            num_slots=state.limits.num_slots,
            block_size=state.limits.block_size,
            max_num_batched_tokens=state.limits.max_num_batched_tokens,
            share_in_use=self._share_in_use(),
            request_blocks=state.total_blocks / max(1, len(state.running)),
            prefill_per_output=prefill_per_output,
            blocks_per_s=state.budget.blocks_per_s,
            costs=state.costs,
        )

    def _next(self) -> Request | None:
        return self._state.waiting.first()

    def _prompt_blocks(self, request: Request) -> int:
        """To allocate for it: what it shares with those who run is there."""
        state = self._state
        needed = blocks_for(len(request.tokens), state.limits.block_size)
        return needed - len(state.prefix_of(request))
