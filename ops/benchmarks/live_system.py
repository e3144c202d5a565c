"""What the benchmarks of a running system share: lengths, a system, and its /metrics."""

import os
import random
import re
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipemax.client import Client, SamplingParams
from pipemax.proto.config import EngineConfig
from pipemax.proto.rundir import METRICS_PORT_FILE
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.processes import ProcessSpec, system_processes
from pipemax.services.launcher.system import System

FIRST_TOKEN_ID, LAST_TOKEN_ID = 300, 4000
"""Prompts are made of these: in the vocabulary, and none is special."""


@dataclass(frozen=True, slots=True)
class Lengths:
    prompt_tokens: int
    output_tokens: int


def lognormal_lengths(
    count: int, mean_in: float, mean_out: float, sigma: float, seed: int
) -> list[Lengths]:
    """Independent lognormals, scaled so that their means are about what is asked for."""
    draw = random.Random(seed)
    prompts = _scaled([draw.lognormvariate(0, sigma) for _ in range(count)], mean_in)
    outputs = _scaled([draw.lognormvariate(0, sigma) for _ in range(count)], mean_out)
    return [Lengths(*pair) for pair in zip(prompts, outputs, strict=True)]


def _scaled(values: list[float], mean: float) -> list[int]:
    factor = mean * len(values) / sum(values)
    return [max(8, round(value * factor)) for value in values]


class Live:
    """A running system and what can be asked of it."""

    def __init__(self, config: EngineConfig, run_dir: Path, client: Client) -> None:
        self.config = config
        self.client = client
        self._url = f"http://127.0.0.1:{(run_dir / METRICS_PORT_FILE).read_text().strip()}/metrics"

    def generate(self, work: list[Lengths], seed: int = 0) -> None:
        """Runs the requests to their full lengths; what they say does not matter."""
        draw = random.Random(seed)
        tokens = range(FIRST_TOKEN_ID, LAST_TOKEN_ID)
        prompts = [draw.choices(tokens, k=lengths.prompt_tokens) for lengths in work]
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=lengths.output_tokens, ignore_eos=True)
            for lengths in work
        ]
        done = self.client.generate(prompts, sampling)
        for completion, lengths in zip(done, work, strict=True):
            if len(completion.token_ids) != lengths.output_tokens:
                raise SystemExit(f"a request failed: {completion}")

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels, as they are written there."""
        with urllib.request.urlopen(self._url, timeout=10) as answer:
            text = answer.read().decode()
        return {name: float(value) for name, value in re.findall(r"^(\w\S*) (\S+)$", text, re.M)}


@contextmanager
def running(name: str, options: EngineOptions, record_to: Path | None = None) -> Iterator[Live]:
    """A system of its own, ready. `record_to`: its coordinator is that of
    `recording_coordinator.py`, which writes there when the system has stopped."""

    def processes(config: EngineConfig, run_dir: Path) -> list[ProcessSpec]:
        specs = list(system_processes(config, run_dir))
        if record_to is not None:
            script = Path(__file__).with_name("recording_coordinator.py")
            argv = (sys.executable, str(script), str(record_to), "--run-dir", str(run_dir))
            specs[0] = replace(specs[0], argv=argv)
        return specs

    config = build_config(options, f"{name}-{os.getpid()}")
    with System(config, temporary=True, processes=processes) as system:
        system.wait_ready()
        with Client(config.name) as client:
            yield Live(config, system.run_dir, client)


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What each sample grew by."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def versions() -> dict[str, Any]:
    from importlib.metadata import version

    names = ("torch", "transformers", "numba", "pipemax")
    return {name: version(name) for name in names} | {"cores": os.cpu_count()}
