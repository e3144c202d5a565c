"""Sampling on the last stage against sampling in sampler workers, on the CPU, both sides in turns.

    python ops/benchmarks/sampler.py [--workers 1] [--vocab 32000 128000] [--rounds 5] [--json OUT]

A random Llama with a real one's vocabulary, split over two stages of one thread each. For each
vocabulary two systems run side by side, one with `--sampler-workers 0`, one with as many as asked;
only one of them has work at a time. They take turns on the same batch, each kind of sampling apart,
and every round gives one ratio of their speeds, so that what else the machine does meanwhile hits
both sides alike. Models load, and a first batch runs, outside the measured time.

Beside the ratio of speeds stand ratios of CPU time, which a busy machine disturbs less: of the last
stage, whose saving is the most that a system with cores to spare can gain where that stage is the
slowest, and of all stages and workers together, which is what the same tokens cost in all.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from live_system import Live, running, versions

from pipemax.client import SamplingParams
from pipemax.services.bench.sampling_kinds import KINDS
from pipemax.services.cli.options import EngineOptions

PROMPT_TOKENS, OUTPUT_TOKENS = 16, 24
STAGES = 2
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def write_model(folder: Path, vocab_size: int) -> Path:
    """A config.json; weights are made up by the stages."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


def options_of(model: Path, workers: int, requests: int) -> EngineOptions:
    return EngineOptions(
        model=str(model),
        load_format="dummy",
        pipeline_parallel_size=STAGES,
        threads_per_stage=1,
        sampler_workers=workers,
        max_model_len=128,
        max_num_seqs=max(1, requests // STAGES),
        kv_cache_memory_bytes="32MiB",
        kv_offloading_size="0",
        warm_up_s=0.0,
    )


def turn(live: Live, kind: str, requests: int) -> dict[str, float]:
    """One batch: output tokens per second, and CPU seconds for each of them."""
    sampling = [
        SamplingParams(seed=index, max_tokens=OUTPUT_TOKENS, ignore_eos=True, **KINDS[kind])
        for index in range(requests)
    ]
    prompts = [[300 + 7 * index + at for at in range(PROMPT_TOKENS)] for index in range(requests)]
    status = live.client.status()
    stages = [stage.pid for stage in status.stages]
    workers = [sampler.pid for sampler in status.samplers]
    before, started = cpu_seconds([*stages, *workers]), time.perf_counter()
    done = live.client.generate(prompts, sampling)
    wall_s = time.perf_counter() - started
    spent = [b - a for a, b in zip(before, cpu_seconds([*stages, *workers]), strict=True)]
    if any(len(completion.token_ids) != OUTPUT_TOKENS for completion in done):
        raise SystemExit("a request failed")
    tokens = requests * OUTPUT_TOKENS
    return {
        "tokens_s": tokens / wall_s,
        "last_stage_cpu_s": spent[STAGES - 1] / tokens,
        "workers_cpu_s": sum(spent[STAGES:]) / tokens,
        "all_cpu_s": sum(spent) / tokens,
    }


def cpu_seconds(pids: list[int]) -> list[float]:
    """Used so far by each process, in user and kernel mode."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return [(int(each[11]) + int(each[12])) / TICKS_PER_S for each in fields]


def measure(vocab_size: int, asked: argparse.Namespace) -> list[dict[str, Any]]:
    records = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = write_model(folder, vocab_size)
        sides = {
            workers: stack.enter_context(
                running(f"sampler-{workers}", options_of(model, workers, asked.requests))
            )
            for workers in (0, asked.workers)
        }
        for kind in asked.kinds:
            for live in sides.values():
                turn(live, kind, asked.requests)
            rounds: list[dict[int, dict[str, float]]] = []
            for number in range(asked.rounds):
                order = sorted(sides, reverse=bool(number % 2))
                rounds.append({w: turn(sides[w], kind, asked.requests) for w in order})
            records.append({"vocab_size": vocab_size, "kind": kind, "rounds": rounds})
            print_row(records[-1], asked.workers)
    return records


def print_row(record: dict[str, Any], workers: int) -> None:
    rounds = record["rounds"]

    def ratio(what: str) -> str:
        found = [one[workers][what] / one[0][what] for one in rounds]
        return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"

    def middle(side: int, what: str) -> float:
        return statistics.median(one[side][what] for one in rounds)

    print(
        f"| {record['vocab_size']} | {record['kind']} | {middle(0, 'tokens_s'):.1f} "
        f"| {middle(workers, 'tokens_s'):.1f} | {ratio('tokens_s')} "
        f"| {1e3 * middle(0, 'last_stage_cpu_s'):.2f} | {ratio('last_stage_cpu_s')} "
        f"| {ratio('all_cpu_s')} |",
        flush=True,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_000])
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options.add_argument("--requests", type=int, default=32)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    print(f"0 sampler workers against {asked.workers}; ratios are median (least–most) of rounds\n")
    print(
        "| vocabulary | sampling | tokens/s, without | with | ratio "
        "| CPU of the last stage, ms/token, without | ratio | CPU of all, ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    records = [record for vocab in asked.vocab for record in measure(vocab, asked)]
    if asked.json:
        about = {
            "versions": versions(),
            "load": os.getloadavg(),
            "asked": vars(asked) | {"json": ""},
        }
        asked.json.write_text(json.dumps({**about, "records": records}, indent=1))


if __name__ == "__main__":
    main()
