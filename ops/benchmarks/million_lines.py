"""A long batch of tiny requests: does memory stay flat, and what does a request cost on the way?

Modelled stages of next to no compute take the GPU out of it: what is left is `run-batch`, the
coordinator and the sockets. `run-batch` runs as its own process against a running system; its
memory and the coordinator's are sampled beside the lines that are out, and their CPU seconds
divided by the requests. Requests per CPU second of the coordinator are what one core of its own
could do, or less: when it is not what the others wait for, steps come with few requests in them,
and a step costs it the same. So its share of a core and the requests of a step are said beside it.

    python ops/benchmarks/million_lines.py --requests 1000000 --json out.json

`--input-gib` pads the lines with blanks until they are so many GiB together, which lie on the disk
as a `.zst` file of a few MiB, or come through a pipe with `--stdin`:

    python ops/benchmarks/million_lines.py --requests 40000 --input-gib 10 --json out.json
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from pipemax.client import Client

PROMPT_TOKENS, OUTPUT_TOKENS = 8, 4
SYSTEM = "million"
LOOK_S = 0.25
SAMPLE_S = 5.0
"""How often memory is looked at for its peak, and how often it is noted down."""
COUNT_BYTES = 2**20
MIB, GIB = 2**20, 2**30
UP = [
    *("--device", "modelled:rtx-4090", "--modelled-time-scale", "0.001", "--model", "llama-2-70b"),
    *("--served-model-name", "m", "--warm-up-s", "0", "--kv-offloading-size", "0"),
    *("--max-num-seqs", "512", "--max-num-batched-tokens", "4096"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--input-gib", type=float, default=0.0, help="pad the lines to so much")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--stdin", action="store_true", help="the lines come through a pipe")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no system behind
    line_bytes = round(asked.input_gib * GIB / asked.requests)
    with tempfile.TemporaryDirectory(prefix="pipemax-million-") as folder:
        os.environ["PIPEMAX_RUNTIME_DIR"] = os.environ["PIPEMAX_STATE_DIR"] = folder
        figures = run(
            Path(folder), asked.requests, line_bytes, stages=asked.stages, through_pipe=asked.stdin
        )
    for name, value in figures.items():
        if name != "samples":
            print(f"{name:32} {value:,.2f}" if isinstance(value, float) else f"{name:32} {value}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


def run(
    folder: Path, num_requests: int, line_bytes: int, *, stages: int, through_pipe: bool = False
) -> dict[str, Any]:
    """`line_bytes`: the length to which lines are padded, 0 for as they are."""
    out = folder / "out.jsonl"
    with running_system(stages) as coordinator:
        watch = Watch(coordinator, out)
        with batch(folder, out, num_requests, line_bytes, through_pipe=through_pipe) as process:
            watch.follow(process)
        written = watch.count_lines()
        with Client(SYSTEM) as client:
            steps = client.status().stages[0].steps
        if process.returncode or written != num_requests:
            raise SystemExit(
                f"run-batch ended with {process.returncode}: {written} lines for {num_requests}"
            )
        return {
            "requests": num_requests,
            "input_mib": num_requests * max(line_bytes, len(line_of(0))) / MIB,
            "through": "a pipe" if through_pipe else ".zst" if line_bytes else ".jsonl",
            "stages": stages,
            **watch.figures(num_requests),
            "requests_per_step": num_requests * OUTPUT_TOKENS / steps,  # each is in so many steps
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, "
            f"Python {platform.python_version()}",
            "date": time.strftime("%Y-%m-%d"),
            "samples": watch.samples,
        }


@contextlib.contextmanager
def running_system(stages: int) -> Iterator[psutil.Process]:
    """Its coordinator."""
    up = subprocess.Popen(
        [sys.executable, "-m", "pipemax", "up", "--name", SYSTEM, "-pp", str(stages), *UP],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert up.stdout is not None
        if not up.stdout.readline():
            raise SystemExit("the system did not start")
        yield next(
            child
            for child in psutil.Process(up.pid).children(recursive=True)
            if "pipemax.coordinator" in child.cmdline()
        )
    finally:
        up.terminate()
        up.wait()


@contextlib.contextmanager
def batch(
    folder: Path, out: Path, num_requests: int, line_bytes: int, *, through_pipe: bool
) -> Iterator[psutil.Popen]:
    """`run-batch` over the lines, in a file made before or through a pipe."""
    command = [sys.executable, "-m", "pipemax", "run-batch", "--name", SYSTEM, "-o", str(out)]
    if through_pipe:
        process = psutil.Popen([*command, "-i", "-"], stdin=subprocess.PIPE)
        writer = threading.Thread(target=feed, args=(process.stdin, num_requests, line_bytes))
        writer.start()
        yield process
        writer.join()
        return
    if line_bytes:
        source = folder / "in.jsonl.zst"
        with importlib.import_module("zstandard").open(source, "wb") as file:
            write_lines(file, num_requests, line_bytes)
    else:
        source = folder / "in.jsonl"
        with source.open("wb") as file:
            write_lines(file, num_requests, line_bytes)
    yield psutil.Popen([*command, "-i", str(source)])


def feed(pipe: BinaryIO, num_requests: int, line_bytes: int) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:
        write_lines(pipe, num_requests, line_bytes)


def write_lines(file: BinaryIO, num_requests: int, line_bytes: int) -> None:
    for index in range(num_requests):
        line = line_of(index)
        file.write(line.rstrip(b"}\n") + b" " * (line_bytes - len(line)) + b"}}\n")


def line_of(index: int) -> bytes:
    body = {
        "model": "m",
        "prompt": list(range(1, 1 + PROMPT_TOKENS)),
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
    }
    rest = f'"method":"POST","url":"/v1/completions","body":{json.dumps(body)}}}\n'
    return f'{{"custom_id":"request-{index}",{rest}'.encode()


class Watch:
    """Follows a run; what it looks at costs the machine a few milliseconds a second."""

    def __init__(self, coordinator: psutil.Process, out: Path) -> None:
        self._coordinator = coordinator
        self._out = out
        self._counted_bytes = 0
        self._lines = 0
        self._most_bytes = {"client": 0, "coordinator": 0}
        self._coordinator_before_s = cpu_s(coordinator)
        self._client_s = self._coordinator_s = self._wall_s = 0.0
        self.samples: list[dict[str, float]] = []

    def follow(self, client: psutil.Popen) -> None:
        """Until it ends."""
        begun_s = time.monotonic()
        next_s = 0.0
        while client.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                now = {
                    "client": client.memory_info().rss,
                    "coordinator": self._coordinator.memory_info().rss,
                }
                self._client_s = cpu_s(client)
                for name, size in now.items():
                    self._most_bytes[name] = max(self._most_bytes[name], size)
                self._wall_s = time.monotonic() - begun_s
                if self._wall_s >= next_s:
                    next_s += SAMPLE_S
                    self._note(now)
            time.sleep(LOOK_S)
        self._wall_s = time.monotonic() - begun_s
        self._coordinator_s = cpu_s(self._coordinator) - self._coordinator_before_s

    def _note(self, now: dict[str, int]) -> None:
        self.samples.append(
            {
                "at_s": round(self._wall_s, 1),
                "lines_out": self.count_lines(),
                "client_mib": round(now["client"] / MIB, 1),
                "coordinator_mib": round(now["coordinator"] / MIB, 1),
                "client_cpu_s": round(self._client_s, 1),
                "coordinator_cpu_s": round(
                    cpu_s(self._coordinator) - self._coordinator_before_s, 1
                ),
            }
        )

    def count_lines(self) -> int:
        """In the output; reads what was added since the last time."""
        if self._out.exists():
            with self._out.open("rb") as file:
                file.seek(self._counted_bytes)
                while part := file.read(COUNT_BYTES):
                    self._lines += part.count(b"\n")
                    self._counted_bytes += len(part)
        return self._lines

    def figures(self, num_requests: int) -> dict[str, Any]:
        return {
            "wall_s": self._wall_s,
            "requests_per_s": num_requests / self._wall_s,
            "coordinator_cpu_s": self._coordinator_s,
            "coordinator_requests_per_cpu_s": num_requests / self._coordinator_s,
            "coordinator_share_of_a_core": self._coordinator_s / self._wall_s,
            "client_cpu_s": self._client_s,
            "client_most_mib": self._most_bytes["client"] / MIB,
            "coordinator_most_mib": self._most_bytes["coordinator"] / MIB,
        }


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
