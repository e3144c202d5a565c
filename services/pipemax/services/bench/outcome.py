"""What a benchmark of throughput came to, as text and as JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipemax.services.bench.work import BenchRequest, output_tokens, prompt_tokens

UNFAIR_CORES = 0.02


@dataclass(frozen=True, slots=True)
class Side:
    """An engine: ours or a peer."""

    name: str
    """With its version."""
    start_up_s: float
    """From the start of its processes until it takes requests; not part of any round."""
    seconds: tuple[float, ...]
    """Of each round, from the first request's submission to the last one's end."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else is recorded of it."""
    idle_cores: float = 0.0
    """CPU time over time, while other engines had their rounds: the less, the fairer."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Ratios of rounds."""

    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        rounds = f"{len(self.ratios)} round" + "s" * (len(self.ratios) > 1)
        return (
            f"{self.median:.2f} (median of {rounds}; "
            f"{min(self.ratios):.2f} to {max(self.ratios):.2f})"
        )


def ratio(ours: Side, peer: Side) -> Spread:
    """Our throughput over the peer's, of each round: what disturbs the machine for long disturbs
    both sides of it."""
    pairs = zip(ours.seconds, peer.seconds, strict=True)
    return Spread(tuple(theirs_s / ours_s for ours_s, theirs_s in pairs))


@dataclass(frozen=True, slots=True)
class Throughput:
    """Requests and tokens of one round; all rounds have as many."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, work: Sequence[BenchRequest]) -> "Throughput":
        return cls(len(work), prompt_tokens(work), output_tokens(work))

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def line(self, side: Side) -> str:
        """As vLLM's benchmark prints it; of several rounds the median."""
        seconds = statistics.median(side.seconds)
        return (
            f"Throughput: {self.num_requests / seconds:.2f} requests/s, "
            f"{self.total_tokens / seconds:.2f} total tokens/s, "
            f"{self.output_tokens / seconds:.2f} output tokens/s"
        )

    def data(self, side: Side) -> dict[str, Any]:
        """JSON: vLLM's keys, and ours."""
        seconds = statistics.median(side.seconds)
        return {
            "elapsed_time": seconds,
            "num_requests": self.num_requests,
            "total_num_tokens": self.total_tokens,
            "requests_per_second": self.num_requests / seconds,
            "tokens_per_second": self.total_tokens / seconds,
            "output_tokens_per_second": self.output_tokens / seconds,
            "num_prompt_tokens": self.prompt_tokens,
            "num_output_tokens": self.output_tokens,
            "engine": side.name,
            "start_up_seconds": side.start_up_s,
            "elapsed_times": list(side.seconds),
            "idle_cores": side.idle_cores,
            **side.about,
        }


def report_lines(size: Throughput, ours: Side, peer: Side | None) -> list[str]:
    """What people read. The first line is that of our own throughput."""
    lines = [
        size.line(ours),
        f"Total num prompt tokens:  {size.prompt_tokens}",
        f"Total num output tokens:  {size.output_tokens}",
        f"Start-up, not counted: {ours.start_up_s:.1f} s",
    ]
    if len(ours.seconds) > 1:
        lines.append(f"Rounds: {_each(ours.seconds)} s; the figures are of the median")
    if peer is not None:
        lines += [
            f"{peer.name}, the same requests in turns: {size.line(peer)}",
            f"Rounds: {_each(peer.seconds)} s; start-up, not counted: {peer.start_up_s:.1f} s",
            f"PipeMax over {peer.name}: {ratio(ours, peer)}",
        ]
        lines += [
            f"{side.name} used {side.idle_cores:.2f} cores while the other was timed, which is not "
            "fair"
            for side in (ours, peer)
            if side.idle_cores > UNFAIR_CORES
        ]
    return lines


def report_data(size: Throughput, ours: Side, peer: Side | None) -> dict[str, Any]:
    """One JSON object: vLLM's keys are ours at the top; the peer is an object in it."""
    data = size.data(ours)
    if peer is not None:
        spread = ratio(ours, peer)
        data["peer"] = size.data(peer)
        data["ratio_to_peer"] = {
            "median": spread.median,
            "least": min(spread.ratios),
            "most": max(spread.ratios),
            "rounds": list(spread.ratios),
        }
    return data


def _each(seconds: Sequence[float]) -> str:
    return ", ".join(f"{one:.2f}" for one in seconds)
