"""Time that a GPU loses to its stage's process between consecutive decode steps, and whether that
process ever waits for the GPU.

    python ops/benchmarks/host_gap_cuda.py [--findings OUT] [--rehearse]

Two stages on one card, the 8B-shaped model of `gpu_throughput.py`, one batch that only decodes.

The gap in front of a step is from the end of the step before until its kernels could begin, as far
as this stage's process is to blame: what the GPU waits for other processes (the next plan, rows of
the previous stage, KV) is theirs. A step that was queued before the one in front of it ended is
timed by CUDA events on the compute stream. One that was not, because its plan came late, is timed
by the host's clock: from when the last of what it needs had arrived, or the step before had landed,
whichever was later, until all of it was queued. Between its events a GPU needs some microseconds of
its own, which count.

Waiting is told in two ways: every call of CudaRuntime that waits is counted on the work loop's
thread, and torch's profiler lists the CUDA calls of that thread, whoever made them.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_common import engine_options, run, shape_for, weights_bytes, write_model
from gpu_device import total_bytes
from gpu_findings import FindingsWriter
from gpu_recording_stage import Step
from live_system import FIRST_TOKEN_ID, LAST_TOKEN_ID

from pipemax.client import Client, SamplingParams
from pipemax.proto.config import CudaDevice, EngineConfig
from pipemax.proto.geometry import BlockGeometry
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.processes import ProcessSpec, system_processes
from pipemax.services.launcher.system import System
from pipemax.services.tiny_model import ModelShape

STAGES = 2
TARGET_US = 200.0
EDGE = 0.1
"""Share of the steps that is left out at each end."""
PROFILE = (60, 20)
"""Decode steps before the profiled ones, and the number of those. Early: none of them counts."""


def configure(model: Path, shape: ModelShape, requests: int, *, rehearse: bool) -> EngineConfig:
    settings: dict[str, Any] = {
        "layer_split": ",".join([str(shape.num_layers // STAGES)] * STAGES),
        "max_model_len": 1024,
        "max_num_seqs": requests,
        "kv_offloading_size": "64MiB",
        "warm_up_s": 0.0,
    }
    if not rehearse:
        return build_config(engine_options(model, STAGES, rehearse=False, **settings), "bench-gap")
    options = engine_options(
        model, STAGES, rehearse=True, kv_cache_memory_bytes="16MiB", **settings
    )
    config = build_config(options, "bench-gap")
    layers = shape.num_layers // STAGES
    block = BlockGeometry(
        layers, config.block_size, shape.num_kv_heads, shape.head_dim, shape.dtype
    )
    cuda = CudaDevice(
        gpus=(0,) * STAGES,
        block_bytes=(block.block_bytes,) * STAGES,
        attention_backend="reference",
    )
    return replace_config(config, device="cuda", cuda=cuda)


def replace_config(config: EngineConfig, **changes: Any) -> EngineConfig:
    """With its rules checked again."""
    return EngineConfig(**{name: getattr(config, name) for name in config.__struct_fields__}
                        | changes)  # fmt: skip


@contextmanager
def recorded(config: EngineConfig, folder: Path, *, simulated: bool) -> Iterator[Client]:
    """The system with recording stages, ready. They write `stage-N.json` when it stops."""
    here = Path(__file__).parent

    def processes(config: EngineConfig, run_dir: Path) -> list[ProcessSpec]:
        if simulated:
            _simulate_gpu(run_dir)
        return [_look_over(spec) for spec in system_processes(config, run_dir)]

    def _look_over(spec: ProcessSpec) -> ProcessSpec:
        argv = spec.argv
        own = argv[argv.index("--run-dir") :]
        if spec.name.startswith("stage-"):
            script = [str(here / "gpu_recording_stage.py"), str(folder / f"{spec.name}.json")]
            script += ["--simulated"] if simulated else ["--profile", *map(str, PROFILE)]
            return replace(spec, argv=(sys.executable, *script, *own))
        if simulated and spec.name == "kv-daemon":
            script = [str(here / "gpu_simulated_daemon.py")]
            return replace(spec, argv=(sys.executable, *script, *own))
        return spec

    with System(config, temporary=True, processes=processes) as system:
        system.wait_ready()
        with Client(config.name) as client:
            yield client


def _simulate_gpu(run_dir: Path) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    from support.fake_cuda.machine import FakeMachine, gpu_dir

    FakeMachine(gpu_bytes=512 * 2**20).at(gpu_dir(run_dir))


def decode(client: Client, requests: int, prompt_tokens: int, output_tokens: int) -> None:
    span = LAST_TOKEN_ID - FIRST_TOKEN_ID
    prompts = [
        [FIRST_TOKEN_ID + (31 * one + 7 * at) % span for at in range(prompt_tokens)]
        for one in range(requests)
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    for completion in client.generate(prompts, [sampling] * requests):
        if len(completion.token_ids) != output_tokens:
            raise SystemExit(f"a request failed: {completion}")


def steady(steps: list[Step]) -> list[Step]:
    """Without the edges of the run, what was profiled, and all up to there."""
    profiled = [number for number, step in enumerate(steps) if step.profiled]
    decoding = steps[profiled[-1] + 1 if profiled else 0 :]
    edge = round(EDGE * len(decoding))
    return decoding[edge : len(decoding) - edge]


def gaps_s(steps: list[Step]) -> list[float]:
    """In front of each decode step that follows another."""
    return [
        second.late_s
        if second.ahead
        else max(0.0, second.launched_at_s - max(second.ready_at_s, first.landed_at_s))
        for first, second in pairwise(steps)
        if first.decodes and second.decodes
    ]


def idle_s(steps: list[Step]) -> list[float]:
    """What a decode step takes beyond its kernels, whoever is to blame: the time from landing to
    landing that is not compute."""
    return [
        max(0.0, second.landed_at_s - first.landed_at_s - second.compute_s)
        for first, second in pairwise(steps)
        if first.decodes and second.decodes
    ]


def report(stage: int, told: dict[str, Any], found: FindingsWriter, *, rehearse: bool) -> None:
    steps = steady([Step(**one) for one in told["steps"]])
    gaps = gaps_s(steps)
    if len(gaps) < 10:
        found.fail(f"stage {stage}: only {len(gaps)} pairs of decode steps")
        return
    ahead = sum(step.ahead for step in steps) / len(steps)
    found.figure(
        f"stage {stage}: host-side gap between decode steps, median",
        statistics.median(gaps) * 1e6, "µs", at_most=None if rehearse else TARGET_US,
        note=f"of {len(gaps)}; 90 % below {statistics.quantiles(gaps, n=10)[-1] * 1e6:.0f} µs; "
        f"{ahead:.0%} queued ahead",
    )  # fmt: skip
    found.figure(
        f"stage {stage}: between decode steps in all, median",
        statistics.median(idle_s(steps)) * 1e6, "µs",
        note="waiting for other processes and for the other stage's kernels included",
    )  # fmt: skip
    waits = [call for at_s, call in told["waits"]
             if steps[0].launched_at_s <= at_s <= steps[-1].landed_at_s]  # fmt: skip
    found.figure(
        f"stage {stage}: calls of the work loop that wait for the GPU", len(waits), at_most=0,
        note=f"of CudaRuntime, in {len(steps)} steps",
    )  # fmt: skip
    if told["profile"] is not None:
        waiting = told["profile"]["waiting"]
        found.figure(
            f"stage {stage}: CUDA calls that wait, by the profiler", sum(waiting.values()),
            at_most=0, note=f"of {told['profile']['calls']} calls of the work loop's thread "
            f"{waiting or ''}",
        )  # fmt: skip
        if not told["profile"]["calls"]:
            found.fail(f"stage {stage}: the profiler saw no CUDA call")
    elif not rehearse:
        found.fail(f"stage {stage}: too few decode steps for the profiler")


def part(asked: argparse.Namespace, found: FindingsWriter, folder: Path) -> None:
    shape = shape_for(asked.rehearse)
    requests, prompt, output = (6, 16, 60) if asked.rehearse else (64, 128, 320)
    if not asked.rehearse and total_bytes() < 1.3 * weights_bytes(shape):
        found.skip("the GPU has no room for an 8B model")
        return
    model = write_model(folder / "model", shape)
    config = configure(model, shape, requests, rehearse=asked.rehearse)
    with recorded(config, folder, simulated=asked.rehearse) as client:
        decode(client, requests, prompt, output)
    for stage in range(STAGES):
        told = json.loads((folder / f"stage-{stage}.json").read_text())
        report(stage, told, found, rehearse=asked.rehearse)


if __name__ == "__main__":
    sys.exit(run(__doc__, part))
