"""`pipemax plan`: placement, rates and advice."""

import json

import pytest
from typer.testing import CliRunner

from pipemax.proto.errors import ConfigError
from pipemax.services.cli import app
from pipemax.services.simulator.command import SimulateFlags, build_spec
from pipemax.services.simulator.planning import Plan, advice, make_plan


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


def test_the_command_prints_and_speaks_json() -> None:
    text = run("--gpu", "a10")
    assert "llama-2-70b on 8 × a10" in text
    assert "10, 10, 10, 10, 10, 10, 10, 10" in text
    assert "Offloading pays" in text
    data = json.loads(run("--gpu", "l20", "--json"))
    assert sum(data["layer_split"]) == 80
    assert data["with_offloading"]["decode_tokens_per_second"] > 0
    assert data["advice"].startswith("Offloading gains")
    with pytest.raises(ConfigError, match="use more GPUs"):
        run("--gpu", "rtx-3090", "--count", "4")
