"""How long until `pipemax run-batch` has its first token, and what its processes hold in memory.

    python ops/benchmarks/start_up.py --model /models/m --json out.json -- --dtype bfloat16 -pp 2

What stands behind `--` goes to `pipemax`. Each of `--runs` starts a system of its own for a request
of one token and stops it: from the start of the command to the result's line in the output. What
the logs say of the parts stands beside it. With `--cold-kernels` no run finds compiled kernels.

Memory is looked at once, in a system that has answered a batch. What is mapped by several processes
counts once: pools, rings and logits are apart, so that a stage is what it holds beyond its weights
and pools, and the daemon what it holds beyond any pool.
"""

import argparse
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from pipemax.proto.rundir import run_dir_of
from pipemax.services.launcher.processes import log_file

NAME, SERVED = "start-up", "m"
MIB = 2**20
PIPEMAX = [sys.executable, "-m", "pipemax"]
LOOK_S = 0.005
PATIENCE_S = 300.0
BATCH, BATCH_TOKENS = 64, 32
"""Requests and tokens of each, before memory is looked at."""
PARTS = ("imports took", "loading took", "timed", "loaded in", "ready, epoch")
"""Log lines that say where the time went."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold-kernels", action="store_true", help="compile kernels in each run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="for pipemax, behind --")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no system behind
    flags = ["--name", NAME, "--served-model-name", SERVED, "--model", asked.model, *asked.flags]
    with tempfile.TemporaryDirectory(prefix="pipemax-start-up-") as folder:
        os.environ["PIPEMAX_RUNTIME_DIR"] = os.environ["PIPEMAX_STATE_DIR"] = folder
        runs = [first_token(Path(folder), flags, asked.cold_kernels) for _ in range(asked.runs)]
        held = memory(Path(folder), flags)
    seconds = [run["first_token_s"] for run in runs]
    figures = {
        "first_token_s": statistics.median(seconds),
        "first_token_s_range": [min(seconds), max(seconds)],
        "cpu_s": statistics.median(run["cpu_s"] for run in runs),
        "kernels": "compiled in each run" if asked.cold_kernels else "cached",
        "memory_mib": held,
        "runs": runs,
        "command": sys.argv,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[1]:.1f}",
        "versions": {name: version(name) for name in ("torch", "transformers", "numba")},
        "date": time.strftime("%Y-%m-%d"),
    }
    print("\n".join(runs[-1]["log"]))
    for name, value in figures.items():
        if name not in ("runs", "command"):
            print(f"{name:24} {value}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


def first_token(folder: Path, flags: list[str], cold_kernels: bool) -> dict[str, Any]:
    out = folder / "out.jsonl"
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        env = {**os.environ, "NUMBA_CACHE_DIR": cache} if cold_kernels else None
        cpu_before_s = cpu_of_children_s()
        start_s, clock = time.monotonic(), time.strftime("%H:%M:%S")
        process = start_batch(folder, out, flags, requests=1, tokens=1, env=env)
        while not (out.exists() and out.stat().st_size):
            if process.poll() is not None or time.monotonic() > start_s + PATIENCE_S:
                process.kill()
                raise SystemExit("run-batch ended, or was killed, without a result")
            time.sleep(LOOK_S)
        first_token_s = time.monotonic() - start_s
        process.wait()
    if '"error": null' not in out.read_text() and '"error":null' not in out.read_text():
        raise SystemExit(f"the request failed: {out.read_text()}")
    return {
        "first_token_s": first_token_s,
        "cpu_s": cpu_of_children_s() - cpu_before_s,
        "log": [f"{clock}     started", *log_lines()],
    }


def start_batch(
    folder: Path,
    out: Path,
    flags: list[str],
    *,
    requests: int,
    tokens: int,
    env: dict[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    body = {
        "model": SERVED,
        "prompt": [5, 6, 7, 8],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body}
        for n in range(requests)
    ]
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out.unlink(missing_ok=True)
    command = [*PIPEMAX, "run-batch", "-i", str(source), "-o", str(out), "--overwrite", *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)


def cpu_of_children_s() -> float:
    """Of those that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def log_lines() -> list[str]:
    """What the processes of the last system say of their start, in order of time."""
    logs = log_file(run_dir_of(NAME), "x").parent.glob("*.log")
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return sorted(line for line in lines if any(part in line for part in PARTS))


def memory(folder: Path, flags: list[str]) -> dict[str, float]:
    """MiB by process."""
    up = subprocess.Popen([*PIPEMAX, "up", *flags], stdout=subprocess.PIPE)
    try:
        assert up.stdout is not None
        if not up.stdout.readline():
            raise SystemExit("the system did not start")
        batch = start_batch(
            folder, folder / "out.jsonl", flags[:2], requests=BATCH, tokens=BATCH_TOKENS
        )
        if batch.wait():
            raise SystemExit("the batch failed")
        weights = weights_bytes()
        children = psutil.Process(up.pid).children(recursive=True)
        held = {name_of(child): own_bytes(child.pid) for child in children}
        return {
            name + (" beyond weights and pools" if name in weights else ""): round(
                (size - weights.get(name, 0)) / MIB, 1
            )
            for name, size in sorted(held.items())
        }
    finally:
        up.terminate()
        up.wait()


def weights_bytes() -> dict[str, int]:
    """By stage, as its log says."""
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    found = {}
    for log in log_file(run_dir_of(NAME), "x").parent.glob("stage-*.log"):
        size, unit = re.findall(r"weights ([\d.]+) (\w+),", log.read_text())[-1]
        found[log.stem] = round(float(size) * units[unit])
    return found


def name_of(process: psutil.Process) -> str:
    words = process.cmdline()
    name = words[words.index("-m") + 1].removeprefix("pipemax.").replace("_", "-")
    if "--index" in words:
        name = f"{name.replace('-worker', '')}-{words[words.index('--index') + 1]}"
    return name


def own_bytes(pid: int) -> int:
    """Resident, but for shared memory: pools and rings lie in it, which others map as well."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


if __name__ == "__main__":
    main()
