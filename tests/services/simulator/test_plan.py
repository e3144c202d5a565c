"""`pipemax plan`: placement, rates and advice."""

import json

import pytest
from typer.testing import CliRunner

from pipemax.proto.errors import ConfigError
from pipemax.services.cli import app
from pipemax.services.simulator.command import SimulateFlags, build_spec
from pipemax.services.simulator.planning import Plan, advice, make_plan
from pipemax.services.simulator.short_run import OUTPUT_TOKENS, short_run, shortened


def plan_of(gpu: str, **changes: object) -> Plan:
    flags = {"gpu": gpu, "count": 8, "model": "llama-2-70b", "sigma": 0.0, "requests": 1}
    return make_plan(build_spec(SimulateFlags(**flags | changes)))  # type: ignore[arg-type]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def test_advice_follows_the_figures() -> None:
    plan = plan_of("rtx-3090")
    assert plan.decode_gain == pytest.approx(1.87, abs=0.01)
    assert advice(plan).startswith("Offloading pays: decode ×1.87")
    assert "compute-bound at 168 requests per batch" in advice(plan_of("l20"))
    lifted = plan_of("rtx-5090", workload="200,200")
    assert lifted.without.batch < lifted.stage.knee
    assert "It lifts decode to the compute knee" in advice(lifted)
    assert "gains next to nothing" in advice(plan_of("rtx-3090", kv_offloading_size="50MB"))
    assert "is off" in advice(plan_of("rtx-3090", kv_offloading_size="0"))


def test_a_small_host_or_a_shared_link_gains_less() -> None:
    full = plan_of("rtx-3090")
    assert full.host_bytes_needed == pytest.approx(8 * 8 * 0.497e9, rel=0.1)
    small = plan_of("rtx-3090", kv_offloading_size="1GB")
    assert 1.0 < small.decode_gain < 1.05
    assert small.host_bytes_needed == pytest.approx(1e9, rel=0.02)
    shared = plan_of("rtx-3090", gpus_per_uplink=2)
    assert shared.decode_gain - 1 == pytest.approx((full.decode_gain - 1) / 2, rel=0.1)


def test_end_to_end_lies_between_its_phases() -> None:
    plan = plan_of("a10")
    both = plan.end_to_end_tokens_s(plan.without)
    assert plan.without.tokens_s < both < plan.prefill_tokens_s


def test_unequal_layers_are_planned_by_the_fullest_stage() -> None:
    plan = plan_of("l20", count=7)
    assert plan.spec.layers == (12, 12, 12, 11, 11, 11, 11)
    assert plan.stage.num_layers == 12


def test_a_short_simulation_stands_beside_the_closed_form() -> None:
    plan = plan_of("rtx-3090", workload="1000,40", requests=50, block_size=64)
    short = shortened(plan)
    in_flight = plan.with_offload.batch * 8  # type: ignore[union-attr]
    assert len(short.workload.requests) == round(1.5 * in_flight)
    assert short.workload.requests[50] == plan.spec.workload.requests[0], "they repeat"
    simulated = short_run(plan)
    assert simulated.fills_devices
    ends = plan.end_to_end_tokens_s(plan.without)
    # Prompts that ride along with decode cost less than the closed form, which takes turns, says.
    assert 0.5 * ends < simulated.without < 1.3 * ends
    assert simulated.with_offload == pytest.approx(simulated.gain * simulated.without)
    assert simulated == short_run(plan)


def test_a_short_simulation_stays_short() -> None:
    many = plan_of("rtx-5090", model="mixtral-8x7b", workload="20,500")
    assert len(shortened(many).workload.requests) == OUTPUT_TOKENS // 500
    few = plan_of("rtx-3090", workload="5000,9000")
    assert len(shortened(few).workload.requests) == 16
    off = plan_of("rtx-3090", workload="3000,6", kv_offloading_size="0", block_size=64)
    alone = short_run(off)
    assert alone.with_offload is None
    assert alone.gain == 1


def test_the_command_prints_and_speaks_json() -> None:
    text = run("--gpu", "a10", "--workload", "1000,10", "--block-size", "64")
    assert "llama-2-70b on 8 × a10" in text
    assert "10, 10, 10, 10, 10, 10, 10, 10" in text
    assert "Offloading pays" in text
    assert "Simulated: the real scheduler with the first" in text
    quick = run("--gpu", "a10", "--no-simulate")
    assert "imulated" not in quick
    data = json.loads(run("--gpu", "l20", "--json", "--no-simulate"))
    assert sum(data["layer_split"]) == 80
    assert data["with_offloading"]["decode_tokens_per_second"] > 0
    assert data["simulated"] is None
    assert data["advice"].startswith("Offloading gains")
    by_hand = ("--layer-split", "12,12,12,11,11,11,11", "--count", "7", "--json", "--no-simulate")
    assert json.loads(run("--gpu", "l20", *by_hand))["layer_split"][0] == 12
    with pytest.raises(ConfigError, match="use more GPUs"):
        run("--gpu", "rtx-3090", "--count", "4")
