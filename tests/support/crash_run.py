"""One batch under `pipemax up`, struck by signals, run again until it is whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from support.command import Up

PATIENCE_S = 240.0
MOST_RUNS = 8
"""Of the client, until the output is whole."""


@dataclass(frozen=True, slots=True)
class Blow:
    """At a share of the lines that are out, what each victim gets: `kill`, or a stop for so many
    seconds."""

    at_share: float
    victims: tuple[str, ...]
    """`launcher`, `client`, `coordinator`, `kv_daemon`, `stage_worker 0`,
    `stage_worker.sampling 0`, …"""
    stop_s: float = 0.0


@dataclass(slots=True)
class Outcome:
    lines: list[dict[str, Any]]
    client_runs: int
    system_starts: int
    struck: list[str] = field(default_factory=list)


def requests_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Greedy, token ids, short prompts of different length. Every second one goes to a sampler, if
    there are any: it brings a bias, of nothing."""
    draw = random.Random(seed)
    return [
        {
            "custom_id": f"request-{index}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "model": "demo",
                "prompt": [draw.randrange(10, 1000) for _ in range(draw.randrange(4, 60))],
                "max_tokens": draw.randrange(4, 24),
                "temperature": 0,
                "ignore_eos": True,
                **({"logit_bias": {"5": 0.0}} if index % 2 else {}),
            },
        }
        for index in range(count)
    ]


class CrashRun:
    """Owns the system and the client of one run."""

    def __init__(self, folder: Path, up_arguments: tuple[object, ...], num_requests: int) -> None:
        self._out = folder / "out.jsonl"
        self._input = folder / "in.jsonl"
        self._input.write_text("".join(json.dumps(r) + "\n" for r in requests_of(num_requests)))
        self._up_arguments = up_arguments
        self._num_requests = num_requests
        self._up: Up | None = None
        self._client: subprocess.Popen[str] | None = None
        self._outcome = Outcome([], 0, 0)
        self._stopped: list[tuple[float, psutil.Process]] = []

    def run(self, blows: list[Blow]) -> Outcome:
        """Until every line is out. Raises AssertionError when that does not happen."""
        deadline = time.monotonic() + PATIENCE_S
        waiting = sorted(blows, key=lambda blow: blow.at_share)
        try:
            while True:
                assert time.monotonic() < deadline, f"not whole in {PATIENCE_S:g} s"
                self._keep_running()
                self._wake_stopped()
                done = self._lines_out() / self._num_requests
                while waiting and done >= waiting[0].at_share:
                    self._strike(waiting.pop(0))
                if self._client is not None and self._client.poll() == 0 and not waiting:
                    break
                time.sleep(0.02)
            self._outcome.lines = [json.loads(line) for line in self._out.read_text().splitlines()]
            return self._outcome
        finally:
            self._end()

    def _keep_running(self) -> None:
        if self._up is not None and self._up.process.poll() is not None:
            self._up.__exit__()
            self._up = None
        if self._up is None:
            self._up = Up(*self._up_arguments).__enter__()
            self._outcome.system_starts += 1
        if self._client is not None and self._client.poll() in (None, 0):
            return
        if self._client is not None:
            self._client.communicate()
        assert self._outcome.client_runs < MOST_RUNS, "the client fails again and again"
        self._outcome.client_runs += 1
        command = [sys.executable, "-m", "pipemax", "run-batch"]
        self._client = subprocess.Popen(
            [*command, "-i", str(self._input), "-o", str(self._out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _lines_out(self) -> int:
        return self._out.read_bytes().count(b"\n") if self._out.exists() else 0

    def _strike(self, blow: Blow) -> None:
        for victim in blow.victims:
            process = self._process(victim)
            if process is None:
                continue
            self._outcome.struck.append(victim)
            try:
                if blow.stop_s:
                    process.send_signal(signal.SIGSTOP)
                    self._stopped.append((time.monotonic() + blow.stop_s, process))
                else:
                    process.kill()
            except psutil.NoSuchProcess:
                pass

    def _process(self, victim: str) -> psutil.Process | None:
        """None while it is not there: dead already, and not yet started again."""
        assert self._up is not None
        try:
            if victim == "launcher":
                return psutil.Process(self._up.process.pid)
            if victim == "client":
                assert self._client is not None
                return psutil.Process(self._client.pid)
            return self._up.child(victim)
        except (AssertionError, psutil.NoSuchProcess):
            return None

    def _wake_stopped(self) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self._stopped if entry[0] <= now]:
            self._stopped.remove(entry)
            if entry[1].is_running():
                entry[1].send_signal(signal.SIGCONT)

    def _end(self) -> None:
        for _, process in self._stopped:
            if process.is_running():
                process.send_signal(signal.SIGCONT)
        if self._client is not None:
            self._client.kill()
            self._client.communicate()
        if self._up is not None:
            if self._up.process.poll() is None:
                os.kill(self._up.process.pid, signal.SIGTERM)
                self._up.process.wait(30)
            self._up.__exit__()


def tokens_by_id(outcome: Outcome) -> dict[str, list[int]]:
    """Raises AssertionError for a line that failed, and for an id that is there twice."""
    found: dict[str, list[int]] = {}
    for line in outcome.lines:
        assert line["error"] is None, line
        assert line["custom_id"] not in found, f"{line['custom_id']} is there twice"
        found[line["custom_id"]] = line["response"]["body"]["choices"][0]["token_ids"]
    return found
