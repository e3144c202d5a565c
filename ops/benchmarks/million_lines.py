"""A long batch of tiny requests: does memory stay flat, and what does a request cost on the way?

Modelled stages of next to no compute take the GPU out of it: what is left is `run-batch`, the
coordinator and the sockets. `run-batch` runs as its own process against a running system; its
memory and the coordinator's are sampled, and their CPU seconds divided by the requests. Requests
per CPU second of the coordinator are what one core of its own could do.

    python ops/benchmarks/million_lines.py --requests 1000000 --json out.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

PROMPT_TOKENS, OUTPUT_TOKENS = 8, 4
SAMPLE_S = 0.25
UP = [
    *("--device", "modelled:rtx-4090", "--modelled-time-scale", "0.001", "--model", "llama-2-70b"),
    *("-pp", "8", "--served-model-name", "m", "--warm-up-s", "0", "--kv-offloading-size", "0"),
    *("--max-num-seqs", "512", "--max-num-batched-tokens", "4096"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pipemax-million-") as folder:
        os.environ["PIPEMAX_RUNTIME_DIR"] = folder
        figures = run(Path(folder), asked.requests)
    for name, value in figures.items():
        print(f"{name:32} {value:,.2f}" if isinstance(value, float) else f"{name:32} {value}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


def run(folder: Path, num_requests: int) -> dict[str, Any]:
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    write_input(source, num_requests)
    name = "million"
    up = subprocess.Popen(
        [sys.executable, "-m", "pipemax", "up", "--name", name, *UP],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert up.stdout is not None
        if not up.stdout.readline():
            raise SystemExit("the system did not start")
        coordinator = _coordinator(up.pid)
        before_s = _cpu_s(coordinator)
        begun_s = time.monotonic()
        command = [sys.executable, "-m", "pipemax", "run-batch", "--name", name]
        batch = psutil.Popen([*command, "-i", str(source), "-o", str(out)])
        most = {"client": 0, "coordinator": 0}
        client_s = 0.0
        while batch.poll() is None:
            try:
                most["client"] = max(most["client"], batch.memory_info().rss)
                client_s = _cpu_s(batch)
            except psutil.NoSuchProcess:
                break
            most["coordinator"] = max(most["coordinator"], coordinator.memory_info().rss)
            time.sleep(SAMPLE_S)
        wall_s = time.monotonic() - begun_s
        coordinator_s = _cpu_s(coordinator) - before_s
        with out.open("rb") as lines:
            written = sum(1 for _ in lines)
        if written != num_requests:
            raise SystemExit(f"{written} lines for {num_requests} requests")
        return {
            "requests": num_requests,
            "input_mib": source.stat().st_size / 2**20,
            "wall_s": wall_s,
            "requests_per_s": num_requests / wall_s,
            "coordinator_cpu_s": coordinator_s,
            "coordinator_requests_per_cpu_s": num_requests / coordinator_s,
            "client_cpu_s": client_s,
            "client_most_mib": most["client"] / 2**20,
            "coordinator_most_mib": most["coordinator"] / 2**20,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, "
            f"Python {platform.python_version()}",
            "date": time.strftime("%Y-%m-%d"),
        }
    finally:
        up.terminate()
        up.wait()


def write_input(path: Path, num_requests: int) -> None:
    body = {
        "model": "m",
        "prompt": list(range(1, 1 + PROMPT_TOKENS)),
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
    }
    rest = f'"method":"POST","url":"/v1/completions","body":{json.dumps(body)}}}\n'
    with path.open("w") as file:
        for index in range(num_requests):
            file.write(f'{{"custom_id":"request-{index}",{rest}')


def _coordinator(launcher: int) -> psutil.Process:
    for child in psutil.Process(launcher).children(recursive=True):
        if "pipemax.coordinator" in child.cmdline():
            return child
    raise SystemExit("no coordinator")


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
