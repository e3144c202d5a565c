"""When prompts are computed: the rules by themselves, and what the scheduler makes of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.coordinator.events import Command, Paused, ToStages
from pipemax.coordinator.phases import (
    DECODE,
    DEFAULT_PREFILL,
    MIXED,
    PREFILL,
    MixedPrefill,
    PhasedPrefill,
    Prospect,
    make_prefill,
)
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages.ingest import SamplingParams
from pipemax.proto.messages.types import unpack_i32
from support.scheduler_world import World

SLOTS = 8


def prospect(requests: float, prefill_steps: float, decode_s: float | None = 0.05) -> Prospect:
    """Prefill steps of 0.25 s."""
    return Prospect(requests, decode_s, 0.25 if decode_s else None, prefill_steps)


def in_decode(best_requests: float = 100) -> PhasedPrefill:
    """In a decode phase that began with such steps and nothing to prefill."""
    phases = PhasedPrefill(SLOTS)
    phases.planned(512, 10**6)
    assert phases.turn(is_idle=False)
    phases.begin(0, lambda: prospect(best_requests, 0))
    assert phases.part == DECODE
    return phases


def test_rules_are_made_by_name() -> None:
    assert isinstance(make_prefill("mixed", 4), MixedPrefill)
    assert isinstance(make_prefill("phases", 4), PhasedPrefill)
    with pytest.raises(ConfigError, match="--prefill both: choose mixed or phases"):
        make_prefill("both", 4)


def test_one_default_everywhere() -> None:
    config = EngineConfig(model="", served_model_name="", layer_split=(1,), max_model_len=1)
    assert config.prefill == DEFAULT_PREFILL


def test_mixed_lets_everybody_take_part_always() -> None:
    mixed = MixedPrefill()
    mixed.begin(0, lambda: prospect(1, 1000))
    mixed.planned(10**9, 1)
    assert not mixed.turn(is_idle=True)
    assert mixed.part == MIXED
    assert mixed.peak_share == 1.0


def test_the_efficiency_of_switching_is_what_the_bubbles_leave() -> None:
    # 30 steps of 0.25 s against 7 waits of 0.2 s.
    assert prospect(1, 30).switch_efficiency(8) == pytest.approx(7.5 / (7.5 + 1.4))
    assert prospect(1, 30).switch_efficiency(1) == 1.0
    assert prospect(1, 0).switch_efficiency(8) == 0.0
    assert prospect(1, 14, None).switch_efficiency(8) == pytest.approx(14 / 21)


def test_a_decode_phase_ends_when_switching_is_more_efficient() -> None:
    efficiency = prospect(1, 30).switch_efficiency(SLOTS)
    phases = in_decode(100)
    phases.begin(SLOTS, lambda: prospect(100 * efficiency + 1, 30))
    assert phases.part == DECODE
    phases.begin(2 * SLOTS, lambda: prospect(100 * efficiency - 1, 30))
    assert phases.part == PREFILL


def test_decoding_goes_on_to_the_last_while_nothing_waits() -> None:
    phases = in_decode(100)
    phases.begin(SLOTS, lambda: prospect(1, 0))
    assert phases.part == DECODE


def test_the_rate_counts_not_the_requests() -> None:
    """Half the requests in half the time are as efficient."""
    phases = in_decode(100)
    phases.begin(SLOTS, lambda: prospect(50, 1000, decode_s=0.025))
    assert phases.part == DECODE


def test_it_is_asked_once_a_round() -> None:
    phases = in_decode(100)
    for step in range(1, SLOTS):
        phases.begin(step, lambda: pytest.fail("asked again in the same round"))
    phases.begin(SLOTS, lambda: prospect(1, 1000))
    assert phases.part == PREFILL


def test_a_phase_with_nothing_to_do_gives_way_but_not_while_its_steps_are_under_way() -> None:
    phases = in_decode()
    assert not phases.turn(is_idle=False)
    assert phases.part == DECODE
    assert phases.turn(is_idle=True)
    assert phases.part == PREFILL
    assert phases.turn(is_idle=False)
    assert phases.part == DECODE


def test_an_empty_prefill_phase_does_not_make_a_worn_out_batch_the_standard() -> None:
    phases = in_decode(100)
    phases.begin(SLOTS, lambda: prospect(10, 1000))
    assert phases.part == PREFILL
    phases.turn(is_idle=False)  # nobody found room
    phases.begin(2 * SLOTS, lambda: prospect(10, 1000))
    assert phases.part == PREFILL


def test_a_decode_phase_is_measured_by_its_own_best_rate() -> None:
    phases = in_decode(100)
    phases.begin(SLOTS, lambda: prospect(10, 1000))
    phases.planned(512, 10**6)
    phases.turn(is_idle=False)
    phases.begin(2 * SLOTS, lambda: prospect(10, 1000))
    assert phases.part == DECODE


def test_a_prefill_phase_ends_when_it_has_filled_all_blocks_once() -> None:
    phases = PhasedPrefill(SLOTS)
    phases.planned(600, 1000)
    assert phases.part == PREFILL
    phases.planned(400, 1000)
    assert phases.part == DECODE


class Watched(World):
    """Notes of every step how many prompt and how many output tokens it computes."""

    def __init__(self, seed: int, **shape: object) -> None:
        self.prompt_lens: dict[int, int] = {}
        self.steps: list[tuple[int, int]] = []
        super().__init__(seed, **shape)  # type: ignore[arg-type]

    def submit(self, key: int, prompt: list[int], sampling: SamplingParams) -> None:
        self.prompt_lens[key] = len(prompt)
        super().submit(key, prompt, sampling)

    def _carry_out(self, command: Command) -> None:
        super()._carry_out(command)
        if isinstance(command, ToStages):
            counts = unpack_i32(command.message.num_tokens)
            flight = self.scheduler.state.in_flight[command.message.step]
            decodes = sum(item.start >= item.request.num_prompt for item in flight.items)
            self.steps.append((sum(count for count in counts if count > 1), decodes))


def run_to_end(world: World) -> None:
    while world.step():
        pass


@given(
    seed=st.integers(0, 2**32),
    host=st.sampled_from([0, 200]),
    link_blocks=st.sampled_from([None, 4.0]),
    policy=st.sampled_from(["oldest-first", "pipemax"]),
)
def test_no_step_of_phases_has_prompts_and_decodes(
    seed: int, host: int, link_blocks: float | None, policy: str
) -> None:
    world = Watched(
        seed, stages=2, blocks=40, host=host, block_size=4, max_num_batched_tokens=16,
        link_blocks=link_blocks, policy=policy, prefill="phases",
    )  # fmt: skip
    for key in range(8):
        sampling = SamplingParams(max_tokens=world.random.randint(1, 20), ignore_eos=True)
        world.submit(key, list(range(world.random.randint(2, 40))), sampling)
    run_to_end(world)
    assert len(world.finished) == 8
    if not world.scheduler.state.counters.preemptions:
        assert all(not prompts or not decodes for prompts, decodes in world.steps)


def phases_of(world: Watched) -> list[str]:
    """The kinds of steps, runs of the same kind as one."""
    kinds = ["prefill" if prompts else "decode" for prompts, _ in world.steps]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]


def submit_many(world: World, count: int, outputs: int) -> None:
    for key in range(count):
        world.submit(key, list(range(1, 15)), SamplingParams(max_tokens=outputs, ignore_eos=True))


def test_a_load_that_fits_is_prefilled_once_and_decoded_once() -> None:
    world = Watched(
        0, stages=2, blocks=200, host=0, block_size=4, max_num_batched_tokens=32, prefill="phases"
    )
    world.tell(Paused())
    submit_many(world, 12, 20)
    world.come_back()
    run_to_end(world)
    assert phases_of(world) == ["prefill", "decode"]
    chunks = [prompts for prompts, _ in world.steps if prompts]
    assert chunks[:-1] == [32] * (len(chunks) - 1)


def test_the_same_load_mixed_is_not() -> None:
    world = Watched(0, stages=2, blocks=200, host=0, block_size=4, max_num_batched_tokens=32)
    world.tell(Paused())
    submit_many(world, 12, 20)
    world.come_back()
    run_to_end(world)
    assert any(prompts and decodes for prompts, decodes in world.steps)


def test_a_prefill_phase_stops_short_of_the_blocks() -> None:
    """At the end of the first prefill phase, what those admitted will need is within 0.9."""
    world = Watched(
        0, stages=2, blocks=100, host=0, block_size=4, max_num_batched_tokens=32, prefill="phases"
    )
    world.tell(Paused())
    submit_many(world, 40, 20)
    world.come_back()
    while not any(decodes for _, decodes in world.steps):
        world.step()
    state = world.scheduler.state
    assert state.waiting
    assert 0.5 * 100 < state.forecast.peak_blocks() <= 0.9 * 100
    run_to_end(world)
    assert len(world.finished) == 40
    assert 4 <= len(phases_of(world)) <= 30


def test_requests_that_end_with_their_first_token_do_not_keep_out_who_decodes() -> None:
    world = Watched(
        0, stages=1, blocks=20, host=0, block_size=4, max_num_batched_tokens=8, prefill="phases"
    )
    world.submit(0, list(range(8)), SamplingParams(max_tokens=6, ignore_eos=True))
    for key in range(1, 600):
        if 0 in world.finished:
            break
        world.submit(key, list(range(8)), SamplingParams(max_tokens=1, ignore_eos=True))
        world.step()
    assert 0 in world.finished


def test_prompts_of_one_token_start_though_they_have_nothing_to_prefill() -> None:
    world = Watched(0, stages=2, blocks=20, host=0, block_size=4, prefill="phases")
    for key in range(3):
        world.submit(key, [key], SamplingParams(max_tokens=3, ignore_eos=True))
        run_to_end(world)
    assert len(world.finished) == 3


def test_a_recomputed_prompt_waits_for_a_prefill_phase_and_gets_it() -> None:
    world = Watched(
        0, stages=2, blocks=60, host=0, block_size=4, max_num_batched_tokens=32, prefill="phases"
    )
    submit_many(world, 6, 20)
    while len(world.steps) < 20:
        world.step()
    world.lose(stage=1)
    world.come_back()
    run_to_end(world)
    assert len(world.finished) == 6
    assert world.scheduler.state.counters.recomputed_tokens
