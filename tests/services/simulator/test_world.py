"""The shipped cores in virtual time: everything finishes, nothing is lost, faults included."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.services.simulator.closed_form import decode_forecast
from pipemax.services.simulator.engine import EventLoop
from pipemax.services.simulator.faults import parse_fault
from pipemax.services.simulator.links import make_links
from pipemax.services.simulator.records import STAGE_STATES, Result
from pipemax.services.simulator.spec import IDEAL, SimulationSpec, Timing
from pipemax.services.simulator.workload import lognormal
from pipemax.services.simulator.world import World, simulate
from pipemax.stage_worker.modelled.catalogue import load_catalogue

CATALOGUE = load_catalogue()


def small(**changes: object) -> SimulationSpec:
    """Four stages whose device pools hold a sixth of what the requests need together."""
    spec = SimulationSpec(
        gpu=CATALOGUE.gpu("rtx-3090"),
        num_gpus=4,
        model=CATALOGUE.model("mixtral-8x7b"),
        workload=lognormal("test", 120, 40, 24, seed=1, sigma=0.5),
        weight_element_bytes=0.5,
        block_size=16,
        device_blocks=64,
        host_bytes=20 * 10**9,
        max_num_batched_tokens=512,
        timing=Timing(load_s=0.5, link_jitter=0.05, compute_jitter=0.02),
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def assert_all_finished(spec: SimulationSpec, result: Result) -> None:
    expected = {key: r.output_tokens for key, r in enumerate(spec.workload.requests)}
    assert result.outputs == expected
    for stage in result.stages:
        assert set(stage.state_s) == set(STAGE_STATES)
        assert sum(stage.state_s.values()) == pytest.approx(result.simulated_s, abs=1e-8)


@pytest.mark.parametrize("host_bytes", [0, 20 * 10**9])
def test_every_request_gets_its_output_and_every_nanosecond_a_state(host_bytes: int) -> None:
    spec = small(host_bytes=host_bytes)
    world = World(spec, check_every=50)
    result = world.run()
    assert_all_finished(spec, result)
    loaded = {stage.load_bytes for stage in result.stages}
    assert (max(loaded) > 0) == bool(host_bytes)
    assert (result.prefetched_tokens > 0) == bool(host_bytes)
    world.coordinator.scheduler.check_invariants()
    state = world.coordinator.scheduler.state
    assert not state.running
    assert state.blocks.num_free == state.blocks.num_blocks


def test_the_seed_determines_the_run() -> None:
    first, again, other = simulate(small()), simulate(small()), simulate(small(seed=1))
    assert first == again
    assert first.simulated_s != other.simulated_s
    assert first.outputs == other.outputs


@pytest.mark.parametrize(
    "faults",
    [
        ("crash-stage:2@1.0+0.5",),
        ("crash-daemon@1.0+0.5",),
        ("crash-stage:0@0.8+0.2", "crash-daemon@1.3+0.1", "crash-stage:3@1.4+0.2"),
        ("crash-stage:1@0.2+0.1", "crash-stage:1@1.31+0.01", "crash-daemon@1.32+0.3"),
    ],
)
def test_crashes_cost_time_and_nothing_else(faults: tuple[str, ...]) -> None:
    spec = small(faults=tuple(parse_fault(text, 4) for text in faults))
    result = World(spec, check_every=80).run()
    assert_all_finished(spec, result)
    undisturbed = simulate(small())
    assert result.simulated_s > undisturbed.simulated_s + 0.1
    crashed = {fault.stage for fault in spec.faults if fault.stage >= 0}
    for index, stage in enumerate(result.stages):
        assert (stage.state_s["down"] > 0) == (index in crashed)


def test_a_slow_stage_and_a_slow_link_are_felt_while_they_last() -> None:
    plain = simulate(small())
    for text in ("slow-stage:1@0.6+1x0.25", "slow-link:1@0.6+60x0.01"):
        spec = small(faults=(parse_fault(text, 4),))
        result = simulate(spec)
        assert_all_finished(spec, result)
        assert result.simulated_s > 1.1 * plain.simulated_s
    waited = [stage.state_s["wait_kv"] for stage in result.stages]
    assert max(waited) == waited[1] > 0


def linked(link_bytes_s: float = 1e9, **changes: object) -> SimulationSpec:
    gpu = replace(CATALOGUE.gpu("rtx-3090"), link_bytes_s=link_bytes_s)
    return small(gpu=gpu, timing=IDEAL, **changes)


def test_a_shared_uplink_halves_what_each_gpu_gets() -> None:
    loop = EventLoop()
    links = make_links(linked(num_gpus=3, gpus_per_uplink=2), loop)
    ended: list[tuple[int, float]] = []

    def copy(stage: int, left: int) -> None:
        """Two copies of 1 MB under way, as the daemon has it, until `left` are started."""
        ended.append((stage, loop.now))
        if left:
            links[stage].copy("load", 10**6, 1, random.Random(0), 0, copy, stage, left - 1)

    for stage in (0, 1, 2):
        copy(stage, 10)
        copy(stage, 10)
    loop.run(10**12, lambda: False)
    assert loop.now == pytest.approx(0.040)
    assert max(at for stage, at in ended if stage == 2) == pytest.approx(0.020)
    rates = [link.report().load_bytes / link.report().load_seconds for link in links]
    assert rates == pytest.approx([0.5e9, 0.5e9, 1e9], rel=0.06)
    assert links[0].report().store_bytes == 0


def test_weights_come_from_the_disk_one_stage_after_the_other() -> None:
    disk = Timing(load_s=0.5, disk_bytes_s=5e9)
    plain = simulate(small())
    spec = small(timing=disk, faults=(parse_fault("crash-stage:1@6+0.1", 4),))
    result = simulate(spec)
    weights_s = [stage.weights_bytes / 5e9 for stage in spec.stages]
    assert result.start_s == pytest.approx(sum(weights_s) + 0.5, abs=0.01)
    assert plain.start_s == pytest.approx(0.5, abs=0.01)
    assert_all_finished(spec, result)
    # The crashed stage reads its own part again, and the others wait.
    assert result.working_s > plain.working_s + 0.1 + weights_s[1] + 0.5


def test_a_horizon_ends_the_run() -> None:
    result = simulate(small(horizon_s=0.7))
    assert result.simulated_s == 0.7
    assert result.working_s == pytest.approx(0.2, abs=0.01)
    for stage in result.stages:
        since_start = sum(result.state_s_since_start(stage).values())
        assert since_start == pytest.approx(result.working_s)
    assert result.steps > 0
    assert result.finished < result.num_requests


def test_intervals_tile_the_window() -> None:
    result = simulate(small(gantt_s=(0.5, 0.9)))
    for stage in range(4):
        spans = [i for i in result.intervals if i.stage == stage]
        assert spans[0].start_s == 0.5
        assert spans[-1].end_s == 0.9
        assert all(a.end_s == b.start_s for a, b in pairwise(spans))


def test_steady_decode_without_offloading_is_the_closed_form() -> None:
    """One request from its first token to its last, one slot, nothing but compute takes time: the
    rate follows from the roofline alone."""
    spec = small(
        num_gpus=1,
        workload=lognormal("test", 1, 100, 1, seed=0, sigma=0),
        host_bytes=0,
        device_blocks=200,
        timing=IDEAL,
        weight_element_bytes=0.25,
    )
    result = simulate(spec)
    stage = spec.stages[0]
    seconds = sum(stage.decode_s(1, n) for n in range(1, 101))
    assert result.simulated_s == pytest.approx(seconds, rel=1e-6)
    forecast = decode_forecast(stage, 1, 250, offload=False)
    assert forecast.tokens_s == pytest.approx(
        forecast.batch / stage.decode_s(forecast.batch, 250 * forecast.batch)
    )


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs \d+: use more GPUs"):
        small(device_blocks=10)
    with pytest.raises(ConfigError, match="layer split 1,2 does not put"):
        small(layer_split=(1, 2))
    with pytest.raises(ConfigError, match="has 32 layers, too few for 64 GPUs"):
        small(num_gpus=64)
    with pytest.raises(ConfigError, match="best"):
        simulate(small(policy="best"))


def test_unequal_layers_work() -> None:
    spec = small(layer_split=(10, 8, 8, 6))
    assert_all_finished(spec, simulate(spec))


@pytest.mark.parametrize(
    "text",
    ["crash-stage@1", "crash-daemon:1@1", "melt:1@1", "slow-link:1@1", "crash-stage:9@1",
     "slow-link:1@1x7", "crash-stage:1@1x0.5", "duplicate-message@1", "late-message@1x0.5", ""],
)  # fmt: skip
def test_bad_faults_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="fault"):
        parse_fault(text, 4)
