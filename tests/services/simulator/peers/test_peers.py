"""Models of peers: closed forms where there are some, and what none may violate."""

import math
from dataclasses import replace

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.services.simulator.faults import parse_fault
from pipemax.services.simulator.peers import PEERS, parse_peers, simulate_peer
from pipemax.services.simulator.peers.jobs import Job
from pipemax.services.simulator.peers.seesaw import reshard_s
from pipemax.services.simulator.peers.td_pipe import KvForecast
from pipemax.services.simulator.peers.tensor import ALL_REDUCE_LATENCY_S, TensorParallel
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import IDEAL, SimulationSpec, Timing
from pipemax.services.simulator.workload import lognormal
from pipemax.stage_worker.modelled.catalogue import load_catalogue
from pipemax.stage_worker.modelled.roofline import StepLoad

CATALOGUE = load_catalogue()


def make_spec(**changes: object) -> SimulationSpec:
    spec = SimulationSpec(
        gpu=CATALOGUE.gpu("rtx-5090"),
        num_gpus=4,
        model=CATALOGUE.model("qwen2_5-32b"),
        workload=lognormal("test", 150, 60, 40, seed=2, sigma=0.7),
        block_size=16,
        max_num_batched_tokens=512,
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def run(name: str, spec: SimulationSpec, bus_bytes_s: float | None = None) -> Result:
    return simulate_peer(name, spec, bus_bytes_s)[2]


def alike(num_requests: int, **changes: object) -> SimulationSpec:
    """Requests of 200 prompt and 100 output tokens, whole prompts in one step."""
    workload = lognormal("alike", 200, 100, num_requests, seed=0, sigma=0)
    return make_spec(workload=workload, timing=IDEAL, max_num_batched_tokens=10**5, **changes)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("device_blocks", [240, 400, None])
def test_every_request_finishes_within_the_pool(name: str, device_blocks: int | None) -> None:
    spec = make_spec(device_blocks=device_blocks)
    result = run(name, spec)
    expected = {key: lengths.output_tokens for key, lengths in enumerate(spec.workload.requests)}
    assert result.outputs == expected
    assert result.generation_tokens == sum(expected.values())
    assert result.prompt_tokens == sum(r.prompt_tokens for r in spec.workload.requests)
    room = result.num_device_blocks * spec.block_size
    assert 0 < max(sample.device_tokens for sample in result.timeline) <= room
    host = result.num_host_blocks * spec.block_size
    assert max(sample.host_tokens for sample in result.timeline) <= host
    assert bool(host) == (name == "seesaw")
    for stage in result.stages:
        assert sum(stage.state_s.values()) == pytest.approx(result.simulated_s)
        assert stage.state_s["compute"] > 0
    assert run(name, spec) == result


@pytest.mark.parametrize("name", PEERS)
def test_a_run_ends_when_as_many_have_finished_as_asked_for(name: str) -> None:
    whole, most = (run(name, make_spec(stop_when_finished=share)) for share in (1.0, 0.7))
    num_requests = len(make_spec().workload.requests)
    assert 0.7 * num_requests <= len(most.outputs) < num_requests
    assert most.simulated_s < whole.simulated_s
    assert most.outputs.items() <= whole.outputs.items()


@pytest.mark.parametrize("name", ["vllm-pp", "vllm-tp"])
def test_small_pools_are_preempted_from_by_recompute(name: str) -> None:
    tight = run(name, make_spec(device_blocks=240))
    assert tight.preemptions > 0
    assert tight.recomputed_tokens > 0
    assert run(name, make_spec()).preemptions == 0


def test_tensor_parallelism_without_all_reduces_is_the_roofline() -> None:
    spec = alike(10)
    whole = TensorParallel(spec).whole
    prompts = StepLoad(0, 0, 2000, 10 * 200 * 201 // 2)
    seconds = whole.step_s(prompts) + sum(whole.decode_s(10, 10 * (200 + n)) for n in range(1, 100))
    steps = 100
    latency_s = steps * 2 * spec.model.num_layers * ALL_REDUCE_LATENCY_S
    result = run("vllm-tp", spec, math.inf)
    assert result.steps == steps
    assert result.simulated_s == pytest.approx(seconds + latency_s)
    one = spec.stages[0].weights_bytes / (0.87 * spec.gpu.hbm_bytes_s)
    fixed_s = spec.efficiencies.t_fix_s
    assert whole.decode_s(1, 0) == pytest.approx(one + fixed_s)


def test_an_all_reduce_costs_what_a_ring_over_the_host_links_does() -> None:
    spec = make_spec(num_gpus=8, model=CATALOGUE.model("llama-2-70b"))
    load = StepLoad(100, 5000)
    size = 100 * 8192 * 2
    bus = 400e9 / 16  # less than the link's 52e9
    expected = 160 * (2 * 7 / 8 * size / bus + ALL_REDUCE_LATENCY_S)
    assert TensorParallel(spec).all_reduce_s(load) == pytest.approx(expected)
    ample = replace(spec, timing=IDEAL)
    assert TensorParallel(ample).bus == spec.gpu.link_bytes_s
    with pytest.raises(ConfigError, match="7 GPUs cannot share evenly"):
        run("vllm-tp", replace(spec, num_gpus=7))


def test_on_one_gpu_both_parallelisms_are_the_same() -> None:
    spec = make_spec(num_gpus=1, weight_element_bytes=0.5)
    assert run("vllm-tp", spec).simulated_s == pytest.approx(run("vllm-pp", spec).simulated_s)


def test_virtual_engines_share_nothing() -> None:
    """All long requests meet in one engine: the others end and leave it alone."""
    spec = make_spec()
    long, short = spec.workload.requests[0], replace(spec.workload.requests[0], output_tokens=2)
    skewed = replace(spec.workload, requests=(replace(long, output_tokens=200), *(short,) * 3) * 6)
    result = run("vllm-pp", make_spec(workload=skewed))
    busiest = max(stage.state_s["compute"] for stage in result.stages)
    assert busiest < 0.35 * result.simulated_s
    with pytest.raises(ConfigError, match="the model of vLLM-PP has 20 for it"):
        run("vllm-pp", make_spec(device_blocks=80))


def test_phases_on_a_full_pipeline_take_what_their_steps_take() -> None:
    """4 batches of 25 that never change: a round takes four steps, and no stage waits."""
    spec = alike(100)
    stage = spec.stages[0]
    result = run("td-pipe", spec)
    decode_s = sum(4 * stage.decode_s(25, 25 * (200 + n)) for n in range(1, 100))
    prefill_s = stage.step_s(StepLoad(0, 0, 20_000, 100 * 200 * 201 // 2))
    assert result.steps == 1 + 4 * 99
    assert result.simulated_s == pytest.approx(decode_s + 4 * prefill_s, rel=0.01)


def test_prefill_stops_where_the_forecast_peaks() -> None:
    forecast = KvForecast(16)
    jobs = [Job(0, 100, 50), Job(1, 40, 200), Job(2, 300, 9)]
    for job in jobs:
        before = forecast.peak
        assert forecast.peak_with(job) > before
        assert forecast.peak == before
        forecast.add(job)
    exact = max(
        sum(-(-(job.prompt_tokens + n) // 16) for job in jobs if n <= job.output_tokens)
        for n in range(1, 201)
    )
    assert exact <= forecast.peak <= exact + len(jobs)
    result = run("td-pipe", alike(200, device_blocks=1000))
    held = max(sample.device_tokens for sample in result.timeline)
    assert 0.8 * 16000 < held <= 0.9 * 16000


def test_resharding_and_buffering_cost_what_they_move() -> None:
    spec = alike(30)
    result = run("seesaw", spec)
    weights = TensorParallel(spec).whole.weights_bytes
    once_s = weights / 4 * 3 / 4 / spec.gpu.link_bytes_s
    assert reshard_s(spec, weights) == pytest.approx(once_s)
    assert result.stages[0].state_s["prepare"] == pytest.approx(once_s)  # one phase of each
    prompts = 30 * 200 * TensorParallel(spec).whole.kv_token_bytes / 4
    assert result.stages[0].store_bytes == pytest.approx(prompts, abs=1)
    assert result.stages[0].load_bytes == pytest.approx(prompts, abs=1)
    assert result.steady_s == 0
    again = run("seesaw", replace(spec, host_bytes=1_200_000_000))  # room for 21 of the 30
    assert again.stages[0].state_s["prepare"] == pytest.approx(3 * once_s)
    with pytest.raises(ConfigError, match="needs host memory"):
        run("seesaw", replace(spec, host_bytes=0))


def test_a_horizon_ends_the_run() -> None:
    for name in PEERS:
        result = run(name, make_spec(horizon_s=1.0))
        assert 1.0 <= result.simulated_s < 1.5
        assert result.finished < result.num_requests


def test_names_are_read_and_what_cannot_be_compared_is_refused() -> None:
    assert parse_peers(("seesaw,vllm-pp", "seesaw")) == ("seesaw", "vllm-pp")
    with pytest.raises(ConfigError, match="'orca' is not one of vllm-pp"):
        parse_peers(("orca",))
    with pytest.raises(ConfigError, match="neither faults nor jitter"):
        run("vllm-pp", make_spec(faults=(parse_fault("crash-stage:1@1", 4),)))
    with pytest.raises(ConfigError, match="neither faults nor jitter"):
        run("vllm-pp", make_spec(timing=Timing(compute_jitter=0.1)))
