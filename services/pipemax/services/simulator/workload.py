"""What is to be generated: lengths of prompts and outputs. What the tokens say does not matter."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipemax.proto.errors import ConfigError

MEANS = {"sharegpt": (343.76, 237.20), "longbench": (2686.89, 101.78)}
"""Mean prompt and output tokens of the data sets the field measures with."""
DEFAULT_SIGMA = 0.8
"""Spread of the lognormal lengths (standard deviation of the logarithm). A choice, not a
measurement: the published means come without a spread."""
_CAP = 8
"""Lengths are cut at this many times their mean."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """One request."""

    prompt_tokens: int
    output_tokens: int
    max_tokens: int | None = None
    """What the request asks for at most; None: as much as the longest output of the workload."""


@dataclass(frozen=True, slots=True)
class Workload:
    """All requests of a run, submitted at once, in this order."""

    name: str
    requests: tuple[Lengths, ...]

    @property
    def mean_in(self) -> float:
        return sum(r.prompt_tokens for r in self.requests) / len(self.requests)

    @property
    def mean_out(self) -> float:
        return sum(r.output_tokens for r in self.requests) / len(self.requests)

    @property
    def mean_decode_context(self) -> float:
        """Context of a request averaged over its decode steps, and over all requests' steps: long
        outputs count more often."""
        steps = sum(r.output_tokens for r in self.requests)
        total = sum(
            r.output_tokens * (r.prompt_tokens + r.output_tokens / 2) for r in self.requests
        )
        return total / steps

    @property
    def max_tokens(self) -> int:
        """Longest output: what a request asks for that states nothing else. It ends earlier by
        itself."""
        return max(r.output_tokens for r in self.requests)

    @property
    def max_model_len(self) -> int:
        longest = self.max_tokens
        return max(r.prompt_tokens + max(longest, r.max_tokens or 0) for r in self.requests)


def lognormal(
    name: str,
    mean_in: float,
    mean_out: float,
    num_requests: int,
    seed: int,
    sigma: float = DEFAULT_SIGMA,
) -> Workload:
    """Lengths drawn from two independent lognormals with these means, cut at 8 times the mean.
    `sigma` 0 makes all requests alike."""
    if num_requests < 1 or mean_in < 1 or mean_out < 1 or not 0 <= sigma <= 3:
        raise ConfigError(
            f"a workload of {num_requests} requests with means {mean_in:g} in and {mean_out:g} out "
            f"and sigma {sigma:g} makes no sense; all but sigma must be at least 1, sigma 0 to 3"
        )
    draw = random.Random(f"lengths {seed}")
    requests = tuple(
        Lengths(_draw(draw, mean_in, sigma), _draw(draw, mean_out, sigma))
        for _ in range(num_requests)
    )
    return Workload(name, requests)


def parse_workload(text: str, num_requests: int, seed: int, sigma: float) -> Workload:
    """`sharegpt`, `longbench`, `IN,OUT` (means of lognormals) or a JSONL file with one object per
    line holding `prompt_tokens`, `output_tokens` and, if it is stated, `max_tokens`. Raises
    ConfigError for anything else."""
    if text.lower() in MEANS:
        return lognormal(text.lower(), *MEANS[text.lower()], num_requests, seed, sigma)
    first, comma, second = text.partition(",")
    if comma:
        try:
            return lognormal(text, float(first), float(second), num_requests, seed, sigma)
        except ValueError:
            pass
    path = Path(text)
    if path.is_file():
        return _from_jsonl(path, num_requests)
    raise ConfigError(
        f"workload {text!r} is not {', '.join(MEANS)}, not two means such as 300,200 and not a file"
    )


def _from_jsonl(path: Path, num_requests: int) -> Workload:
    """At most `num_requests` lines."""
    requests: list[Lengths] = []
    try:
        with path.open() as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and len(requests) < num_requests:
                    requests.append(_lengths(path, number, line))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not requests:
        raise ConfigError(f"{path} holds no requests")
    return Workload(path.name, tuple(requests))


def _lengths(path: Path, number: int, line: str) -> Lengths:
    try:
        record = json.loads(line)
        values = [record["prompt_tokens"], record["output_tokens"]]
        values += [record["max_tokens"]] if "max_tokens" in record else []
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}:{number}: each line holds an object with prompt_tokens and output_tokens"
        ) from error
    if not all(type(value) is int and value >= 1 for value in values):
        raise ConfigError(f"{path}:{number}: lengths are whole numbers of at least 1, not {values}")
    if len(values) == 3 and values[2] < values[1]:
        raise ConfigError(f"{path}:{number}: max_tokens {values[2]} is less than output_tokens")
    return Lengths(*values)


def total_tokens(requests: Sequence[Lengths]) -> int:
    """Prompt and output tokens of all."""
    return sum(r.prompt_tokens + r.output_tokens for r in requests)


def _draw(draw: random.Random, mean: float, sigma: float) -> int:
    value = draw.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)
    return max(1, round(min(value, _CAP * mean)))
