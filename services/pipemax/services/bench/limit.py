"""The least time in which a machine can compute a workload, whatever engine runs on it.

The prompts are computed at the rate of large products; then come decode steps, in each of which
every request that takes part gets one token:

    T = Σ over steps of [max(FLOP(n) / F(n), W / B) + KV / B]  +  prompt FLOP / F(large)

n is the number of requests in the step, FLOP(n) = 2·P·n for the P parameters of all matrices that
a token meets (layers and head, not the embedding, which is looked up), F(n) the measured rate of
matrix products with n rows, W the bytes of these matrices, B the measured bandwidth of reading
memory, and KV the bytes of keys and values that the step's requests attend to. F and B are those of
all used cores together. A prompt costs 2·P_layers per token, 4·layers·heads·head_dim FLOP for each
pair of a token and one that it sees, and the head once, which gives the first token: a request of k
output tokens takes k − 1 steps. The formula is a step's roofline (Williams, Waterman and Patterson,
2009), as the goals of this project state it; norms, activations, sampling, messages and everything
else that is neither product nor read count nothing.

**The ideal schedule.** Only the products depend on who runs with whom. No two steps can be at once,
and a request is in a step once, so with k steps at most S(k) = Σ over requests of min(steps, k)
tokens come about, and with at most c requests in each, min(c·k, S(k)). Taking, in each step, the
requests with the most tokens left reaches that for every k (McNaughton, 1959), so its step k has

    n(k) = min(c·k, S(k)) − min(c·(k−1), S(k−1))

requests. Among all caps c up to what may run at once, the one that takes the least time is the
schedule. A better one can exist where F has steps; `Limit.bound_s` is what none can beat: see
`_least_products_s`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipemax.services.bench.work import BenchRequest

Floats = npt.NDArray[np.float64]
_CAPS = 64
"""Caps tried, at most, besides all measured row counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderCost:
    """What a token costs. Parameters are of matrices."""

    layer_parameters: float
    """Of all layers."""
    head_parameters: float
    kv_token_bytes: float
    """Keys and values of a token, of all layers."""
    pair_flop: float
    """A token's attention to one other, or to itself: 4·layers·heads·head_dim."""
    weight_element_bytes: float

    @property
    def token_flop(self) -> float:
        return 2 * (self.layer_parameters + self.head_parameters)

    @property
    def weights_bytes(self) -> float:
        """That each decode step reads."""
        return (self.layer_parameters + self.head_parameters) * self.weight_element_bytes

    def prompt_flop(self, tokens: int) -> float:
        pairs = tokens * (tokens + 1) / 2
        return (
            2 * self.layer_parameters * tokens + self.pair_flop * pairs + 2 * self.head_parameters
        )


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Of all used cores together."""

    product_flop_s: Mapping[int, float]
    """FLOP/s of matrix products, by rows; of one row too."""
    read_bytes_s: float

    @property
    def large_flop_s(self) -> float:
        """Of the products with most rows."""
        return self.product_flop_s[max(self.product_flop_s)]

    def products_s(self, rows: Floats, token_flop: float) -> Floats:
        """Seconds of a step's products. Between measured rows the time is interpolated; beyond them
        the rate is that of the most."""
        known = sorted(self.product_flop_s)
        seconds = [token_flop * count / self.product_flop_s[count] for count in known]
        beyond = rows * token_flop / self.large_flop_s
        return np.where(rows > known[-1], beyond, np.interp(rows, known, seconds))


@dataclass(frozen=True, slots=True)
class Limit:
    """What no engine on this machine comes under, in parts."""

    steps: int
    most_requests: int
    """In one step of the ideal schedule."""
    products_s: float
    """Of decode steps: products or reading the weights, whichever is longer in each."""
    kv_s: float
    prompts_s: float
    bound_s: float
    """At least this for the whole, under any schedule."""

    @property
    def seconds(self) -> float:
        return self.products_s + self.kv_s + self.prompts_s


def limit_of(
    work: Sequence[BenchRequest],
    cost: DecoderCost,
    rates: MachineRates,
    most_requests: int | None = None,
) -> Limit:
    """`most_requests`: that may run at once; None: all of them."""
    most = min(len(work), most_requests or len(work))
    step_s = _step_times(most, cost, rates)
    steps = [request.output_tokens - 1 for request in work]
    rows, products_s = ideal_rows(steps, step_s, list(rates.product_flop_s))
    tokens = sum(map(_context_tokens, work))
    kv_s = cost.kv_token_bytes * tokens / rates.read_bytes_s
    prompts_s = (
        sum(cost.prompt_flop(len(request.prompt_token_ids)) for request in work)
        / rates.large_flop_s
    )
    return Limit(
        steps=len(rows),
        most_requests=max(rows, default=0),
        products_s=products_s,
        kv_s=kv_s,
        prompts_s=prompts_s,
        bound_s=_least_products_s(steps, step_s) + kv_s + prompts_s,
    )


def ideal_rows(
    steps: Sequence[int], step_s: Floats, caps: Sequence[int] = ()
) -> tuple[list[int], float]:
    """Requests in each step of the ideal schedule, and the seconds of all.

    `steps`: of each request; `step_s[n]`: seconds of a step of n requests, from none to as many as
    may run at once; `caps`: to be tried besides."""
    most = len(step_s) - 1
    spread = np.linspace(1, most, min(most, _CAPS)).round()
    tried = sorted({int(cap) for cap in (*spread, *caps) if 1 <= cap <= most})
    best: tuple[list[int], float] = ([], 0.0)
    for number, cap in enumerate(tried):
        rows = rows_under_cap(steps, cap)
        seconds = float(step_s[rows].sum())
        if number == 0 or seconds < best[1]:
            best = rows.tolist(), seconds
    return best


def rows_under_cap(steps: Sequence[int], cap: int) -> npt.NDArray[np.int64]:
    """Requests in each step when at most `cap` run and those with most steps left go first."""
    total, longest = sum(steps), max(steps, default=0)
    num_steps = max(longest, -(-total // cap))
    alive = np.zeros(num_steps, np.int64)
    ends = np.bincount(np.asarray(steps, np.int64), minlength=num_steps + 1)
    alive[:] = len(steps) - np.cumsum(ends)[:num_steps]
    done = np.minimum(np.cumsum(alive), cap * np.arange(1, num_steps + 1))
    return np.diff(done, prepend=0)


def _step_times(most: int, cost: DecoderCost, rates: MachineRates) -> Floats:
    """Seconds of products and weights of a step, by its requests from 0 to `most`."""
    rows = np.arange(most + 1, dtype=np.float64)
    seconds = np.maximum(
        rates.products_s(rows, cost.token_flop), cost.weights_bytes / rates.read_bytes_s
    )
    seconds[0] = 0.0
    return seconds


def _least_products_s(steps: Sequence[int], step_s: Floats) -> float:
    """Seconds that the products take at least under any schedule.

    Any schedule has x(n) steps of n requests, with Σ n·x(n) = all tokens D and Σ x(n) ≥ the longest
    request's L. Dropping everything else leaves a linear program, whose dual is the largest
    μ·D + λ·L with λ ≥ 0 and μ·n + λ ≤ time(n) for all n. It is concave in λ and piecewise linear.
    """
    total, longest = sum(steps), max(steps, default=0)
    if not total:
        return 0.0
    rows, seconds = np.arange(1, len(step_s)), step_s[1:]

    def value(line: float) -> float:
        return float(((seconds - line) / rows).min()) * total + line * longest

    low, high = 0.0, float(seconds.min())
    for _ in range(100):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if value(left) < value(right):
            low = left
        else:
            high = right
    return max(value(low), value(high))


def _context_tokens(request: BenchRequest) -> int:
    """Tokens attended to in all decode steps of a request: step k sees its prompt and k tokens
    more, the last of them its own."""
    steps = request.output_tokens - 1
    return steps * len(request.prompt_token_ids) + steps * (steps + 1) // 2
