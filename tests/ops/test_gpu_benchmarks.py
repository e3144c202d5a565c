"""What the benchmarks of `make gpu-check` compute, without a GPU."""

from pathlib import Path
from typing import Any

import gpu_common
import gpu_device
import gpu_findings
import gpu_throughput
import host_gap_cuda
import offload_cuda
import pytest
import torch
from gpu_common import SHAPE_8B, SHAPE_SMALL, kv_token_bytes, weights_bytes, write_model
from gpu_findings import FindingsWriter
from gpu_recording_stage import Step, calls_of_thread
from single_process_cuda import PlainLoop, Work, load

from pipemax.services.tiny_model import ModelShape
from pipemax.stage_worker.attention.device.paged import DevicePagedAttention

CPU = torch.device("cpu")


def test_the_8b_shape_has_8_billion_parameters() -> None:
    assert weights_bytes(SHAPE_8B) == 2 * 8_030_261_248  # as Llama 3 8B has
    assert kv_token_bytes(SHAPE_8B) == 128 * 1024


def test_weights_are_counted_as_they_are_loaded(tmp_path: Path) -> None:
    model = load(write_model(tmp_path, SHAPE_SMALL), "reference", CPU)
    assert model.weights_bytes == weights_bytes(SHAPE_SMALL)
    geometry = model.geometry
    assert geometry.block_bytes == kv_token_bytes(SHAPE_SMALL) * geometry.block_size


def test_the_plain_loop_computes_what_the_model_says(tmp_path: Path) -> None:
    """Its tokens are those of one prompt with all of them in it."""
    shape = ModelShape(
        num_layers=2, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
        vocab_size=512,
    )  # fmt: skip
    directory = write_model(tmp_path, shape)
    work = Work(requests=3, prompt_tokens=21, output_tokens=24)
    loop = PlainLoop(directory, "reference", CPU, work)
    loop.prefill()
    tokens = [loop._next.tolist()]
    for steps in range(1, work.output_tokens):
        loop.decode(steps)  # from the first token again
        tokens.append(loop._batch.token_ids[0].tolist())
    model = load(directory, "reference", CPU)
    model.bind_pool(torch.zeros(8, *model.geometry.block_shape))
    attention = model.attention
    assert isinstance(attention, DevicePagedAttention)
    from support.paged_run import Item, step_plan

    for request in range(work.requests):
        prompt = [3 + (7 * request + 11 * at) % 251 for at in range(work.prompt_tokens)]
        answer = [step[request] for step in tokens]
        assert len(set(answer)) > 3
        whole = prompt + answer[:-1]
        for end in range(work.prompt_tokens, len(whole) + 1):
            step = attention.prepare(step_plan([Item(whole[:end], 0, [0, 1, 2])]))
            expected = int(model.forward(step, None).argmax())
            assert answer[end - work.prompt_tokens] == expected, (request, end)


def test_as_many_requests_as_there_is_room_for() -> None:
    assert gpu_throughput.size_for(SHAPE_8B, 80 * 10**9) == gpu_throughput.FULL
    assert gpu_throughput.size_for(SHAPE_8B, 16 * 10**9) is None
    size = gpu_throughput.size_for(SHAPE_8B, 24 * 10**9)
    assert size is not None
    kv_bytes = size.requests * (size.prompt_tokens + size.output_tokens) * 128 * 1024
    assert 16_060_522_496 + kv_bytes < 22 * 10**9


def test_only_steps_of_the_whole_batch_count() -> None:
    """[seconds, stage, decoding requests, context tokens, prompt tokens, pairs, compute seconds]"""
    steps = [
        [0.0, 0, 4, 40, 0, 0, 0.1],  # before the run
        [1.0, 0, 2, 20, 16, 0, 0.1],
        [1.5, 0, 4, 40, 0, 0, 0.1],
        [1.6, 0, 4, 44, 0, 0, 0.1],
        [1.8, 0, 4, 48, 0, 0, 0.1],
        [2.4, 0, 3, 40, 0, 0, 0.1],
        [9.0, 0, 4, 40, 0, 0, 0.1],  # behind it
    ]
    assert gpu_throughput.full_batch_rate(steps, (0.5, 3.0), 4) == pytest.approx(8 / 0.3)
    assert gpu_throughput.full_batch_rate(steps, (0.5, 3.0), 5) == 0


def test_the_middle_of_a_run_is_steady() -> None:
    slow_ends = [(0.0, 0.0), (10.0, 100.0), (11.0, 500.0), (20.0, 500.0)]
    assert offload_cuda.reached_s(slow_ends, 100.0) == 10.0
    assert offload_cuda.reached_s(slow_ends, 300.0) == 10.5
    assert offload_cuda.window_rate(slow_ends) == pytest.approx(300 / 0.75)
    assert offload_cuda.window_rate([]) == 0


def test_pinning_is_read_from_logs(tmp_path: Path) -> None:
    """As host_region.py and main.py of a stage write them."""
    pinned = "stage-0 INFO pinned 8.0 GiB of host memory in 0.7 s"
    loaded = "stage-0 INFO layers [0, 16), weights 7.5 GiB, 9 KV blocks of 1.0 MiB, loaded in 9.1 s"
    (tmp_path / "stage-0.log").write_text(f"18:12:43.250 {pinned}\n18:12:50.000 {loaded}\n")
    (tmp_path / "stage-1.log").write_text(f"23:59:59.500 {loaded}\n00:00:01.750 {pinned}\n")
    (tmp_path / "stage-2.log").write_text(f"18:12:50.000 {loaded}\n")
    assert offload_cuda.pinnings(tmp_path) == [
        offload_cuda.Pinning(0.7, 0.0),
        offload_cuda.Pinning(0.7, 2.25),
    ]


@pytest.mark.parametrize("stages", [2, 4])
def test_the_imitated_card_has_24_gb(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_cuda, "free_bytes", lambda: 80 * 10**9)
    given = offload_cuda.setting(stages, rehearse=False)
    assert given is not None
    assert weights_bytes(given.shape) + given.kv_bytes == 24 * 10**9
    assert sum(one.prompt_tokens for one in given.work) / len(given.work) == pytest.approx(
        344, 0.02
    )
    assert sum(one.output_tokens for one in given.work) / len(given.work) == pytest.approx(
        237, 0.02
    )
    need = sum(one.prompt_tokens + one.output_tokens for one in given.work)
    assert need * kv_token_bytes(given.shape) > 2 * given.kv_bytes  # memory is short
    monkeypatch.setattr(offload_cuda, "free_bytes", lambda: 18 * 10**9)
    assert offload_cuda.setting(stages, rehearse=False) is None


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$2" = 1 ] && echo "NVIDIA A, 81559" || echo "no device"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_device.query("1", ["name", "memory.total"]) == ["NVIDIA A", "81559"]
    assert gpu_device.query("0", ["name", "memory.total"]) is None
    assert gpu_device.used_mib("1") is None  # two values for one name
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert gpu_device.chosen() == "3"


def test_all_stages_are_on_the_one_gpu(tmp_path: Path) -> None:
    options = gpu_common.engine_options(tmp_path, 4, rehearse=False)
    assert (options.device, options.gpus, options.load_format) == ("cuda", "0,0,0,0", "dummy")
    assert gpu_common.engine_options(tmp_path, 2, rehearse=True).device == "cpu"


def _step(number: int, launched: float, landed: float, **more: Any) -> Step:
    values: dict[str, Any] = {"ready_at_s": launched - 0.01, "decodes": 4, "compute_s": 0.05}
    return Step(step=number, launched_at_s=launched, landed_at_s=landed, **(values | more))


def test_a_gap_is_what_the_stage_itself_is_late() -> None:
    steps = [
        _step(1, 1.00, 1.10),
        _step(2, 1.05, 1.20, ahead=True, late_s=2e-5),  # timed by the GPU
        _step(3, 1.30, 1.40, ready_at_s=1.29),  # its plan came late: from then on
        _step(4, 1.45, 1.50, ready_at_s=1.35),  # from the end of the step before
        _step(5, 1.60, 1.70, decodes=0),  # a prompt
        _step(6, 1.80, 1.90),  # behind it
    ]
    assert host_gap_cuda.gaps_s(steps) == pytest.approx([2e-5, 0.01, 0.05])
    assert host_gap_cuda.idle_s(steps) == pytest.approx([0.05, 0.15, 0.05])


def test_what_was_profiled_does_not_count() -> None:
    steps = [_step(n, n, n + 0.5, profiled=n in (3, 4)) for n in range(25)]
    kept = [step.step for step in host_gap_cuda.steady(steps)]
    assert kept == list(range(7, 23))  # from 5 on, without a tenth at each end


def test_calls_that_wait_are_found_in_a_trace() -> None:
    def call(name: str, at: float, thread: int = 7, category: str = "cuda_runtime") -> Any:
        return {"cat": category, "name": name, "ts": at, "tid": thread}

    events = [
        call("cudaDeviceSynchronize", 1),  # the profiler's own
        call("cudaGraphLaunch", 2),
        call("cudaEventRecord", 3),
        call("cudaStreamSynchronize", 4),
        call("cudaEventSynchronize", 4, thread=8),  # a thread that may wait
        call("cudaMemcpyAsync", 5),
        call("cudaStreamSynchronize", 5, category="cpu_op"),
        call("cuLaunchKernel", 6, category="cuda_driver"),
        call("cudaDeviceSynchronize", 7),
    ]
    found = calls_of_thread(events, 7)
    assert found == {"calls": 5, "waiting": {"cudaStreamSynchronize": 1}}
    assert calls_of_thread(events[:1], 7) == {"calls": 0, "waiting": {}}


def test_a_part_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["part", "--findings", str(tmp_path / "f.json")])

    def part(asked: Any, found: FindingsWriter, folder: Path) -> None:
        found.figure("first", 1.0)
        raise RuntimeError("the system\ndied")

    assert gpu_common.run("What it does.", part) == 1
    found = gpu_findings.read(tmp_path / "f.json")
    assert found.failures == ["RuntimeError: the system died"]
    assert [figure.name for figure in found.figures] == ["first"]
