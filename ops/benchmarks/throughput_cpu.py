"""PipeMax against transformers on the CPU, both sides in one run.

    python ops/benchmarks/throughput_cpu.py [--rounds 3] [--stages 1 2] [--json OUT]

One random bfloat16 model of about 100 M parameters; 32 requests of mixed length (mean 128 in,
96 out), end-of-sequence ignored. Contenders: PipeMax with the given stage counts, transformers'
`generate` on one padded batch of 32 (run to the longest output; only the tokens asked for are
counted), and transformers' continuous batching. Each contender is a process of its own with two
threads in all; model loading and a warm-up are outside the measured time; contenders take turns.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

THREADS = 2
NUM_REQUESTS = 32
Work = list[tuple[list[int], int]]
"""(prompt token ids, output tokens) per request."""


def make_work(seed: int = 1) -> Work:
    """Lognormal lengths scaled to means of exactly about 128 in and 96 out."""
    draw = random.Random(seed)
    lengths_in = scaled([draw.lognormvariate(0, 0.6) for _ in range(NUM_REQUESTS)], 128)
    lengths_out = scaled([draw.lognormvariate(0, 0.6) for _ in range(NUM_REQUESTS)], 96)
    return [
        ([draw.randrange(300, 8000) for _ in range(count_in)], count_out)
        for count_in, count_out in zip(lengths_in, lengths_out, strict=True)
    ]


def scaled(values: list[float], mean: float) -> list[int]:
    factor = mean * len(values) / sum(values)
    return [max(4, round(value * factor)) for value in values]


def warm_up_work() -> Work:
    return [(list(range(300, 332)), 4) for _ in range(NUM_REQUESTS)]


def serve_turns(run: Callable[[Work], None]) -> None:
    """A contender's side: one measured run per line on stdin."""
    run(warm_up_work())
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        run(make_work())
        print(time.perf_counter() - started, flush=True)


def contend_pipemax(model_dir: Path, stages: int) -> None:
    from pipemax.client import Client, SamplingParams
    from pipemax.services.cli.options import EngineOptions
    from pipemax.services.engine_config import build_config
    from pipemax.services.launcher.system import System

    options = EngineOptions(
        model=str(model_dir),
        pipeline_parallel_size=stages,
        kv_cache_memory_bytes="512MiB",
        kv_offloading_size="256MiB",
        max_model_len=1024,
        threads_per_stage=THREADS // stages,
    )
    config = build_config(options, f"bench-{os.getpid()}")
    with System(config, temporary=True) as system:
        system.wait_ready()
        client = Client(config.name)

        def run(work: Work) -> None:
            sampling = [
                SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
                for _, count in work
            ]
            done = client.generate([prompt for prompt, _ in work], sampling)
            assert [len(c.token_ids) for c in done] == [count for _, count in work]

        with client:
            serve_turns(run)


def load_transformers(model_dir: Path):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()


def contend_generate(model_dir: Path) -> None:
    import torch

    model = load_transformers(model_dir)

    def run(work: Work) -> None:
        longest = max(len(prompt) for prompt, _ in work)
        ids = torch.zeros(len(work), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(work):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        steps = max(count for _, count in work)
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=steps,
                min_new_tokens=steps, pad_token_id=0,
            )  # fmt: skip

    serve_turns(run)


def contend_continuous(model_dir: Path) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load_transformers(model_dir)
    model.set_attn_implementation("sdpa")
    generation = GenerationConfig(do_sample=False, max_new_tokens=512, eos_token_id=-1)
    # The whole work fits: 32 requests of at most 1,024 tokens.
    cache = ContinuousBatchingConfig(num_blocks=1024, block_size=32, max_batch_tokens=1024)

    def run(work: Work) -> None:
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=cache
        ) as manager:
            for prompt, count in work:
                manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
            left = len(work)
            while left:
                result = manager.get_result(timeout=60)
                if result is None:
                    raise RuntimeError("continuous batching gave no result for a minute")
                left -= result.is_finished()

    serve_turns(run)


class Contender:
    """A process that runs the work whenever it is told to."""

    def __init__(self, name: str, model_dir: Path, *arguments: str) -> None:
        self.name = name
        self.seconds: list[float] = []
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--contend", name, "--model", str(model_dir), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._expect("ready")

    def take_turn(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.seconds.append(float(self._expect()))

    def close(self) -> None:
        self._process.communicate()

    def _expect(self, line: str | None = None) -> str:
        assert self._process.stdout is not None
        for found in self._process.stdout:
            word = found.strip()
            if line is None or word == line:
                return word
        raise SystemExit(f"{self.name} ended with status {self._process.wait()}")


def report(contenders: list[Contender], work: Work) -> dict[str, object]:
    tokens_in = sum(len(prompt) for prompt, _ in work)
    tokens_out = sum(count for _, count in work)
    medians = {c.name: statistics.median(c.seconds) for c in contenders}
    best_peer = min(s for name, s in medians.items() if not name.startswith("pipemax"))
    print(f"{len(work)} requests, {tokens_in} prompt tokens, {tokens_out} output tokens")
    for contender in contenders:
        seconds = medians[contender.name]
        print(
            f"{contender.name:<14} {seconds:7.2f} s  {tokens_out / seconds:8.1f} output tokens/s  "
            f"x{best_peer / seconds:.2f} of the better transformers path"
        )
    return {
        "seconds": {c.name: c.seconds for c in contenders},
        "output_tokens": tokens_out,
        "ratio_to_best_peer": {name: best_peer / seconds for name, seconds in medians.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "pipemax")},
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend == "generate":
        return contend_generate(options.model)
    if options.contend == "continuous":
        return contend_continuous(options.model)
    if options.contend:
        return contend_pipemax(options.model, options.stages[0])
    from pipemax.services.tiny_model import SHAPE_100M, make_demo_model

    with tempfile.TemporaryDirectory(prefix="pipemax-bench-") as folder:
        make_demo_model(Path(folder), shape=SHAPE_100M)
        contenders = [Contender(f"pipemax-{n}", Path(folder), "--stages", str(n))
                      for n in options.stages]  # fmt: skip
        contenders += [Contender(name, Path(folder)) for name in ("generate", "continuous")]
        for _ in range(options.rounds):
            for contender in contenders:
                contender.take_turn()
        for contender in contenders:
            contender.close()
        result = report(contenders, make_work())
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
