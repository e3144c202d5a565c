"""Steady decode of a whole pipeline in closed form, and what offloading gains in it."""

import math
from dataclasses import dataclass

from pipemax.stage_worker.modelled.roofline import StageModel


@dataclass(frozen=True, slots=True)
class DecodeForecast:
    """Steady decode of a whole pipeline, from the closed form."""

    batch: float
    """Requests in a micro-batch."""
    step_s: float
    tokens_s: float
    """Output tokens per second of the pipeline: one micro-batch leaves it per step."""
    prefetched_tokens: float
    """Context tokens that come from the host for each step and stage."""


def decode_forecast(
    stage: StageModel,
    num_slots: int,
    mean_context: float,
    *,
    offload: bool,
    host_tokens: float = math.inf,
    staging_buffers: int = 2,
) -> DecodeForecast:
    """Closed form of steady decode with every request at the mean context.

    Without offloading the device pool of K tokens is shared by N slots. With it, m staging buffers
    of X tokens each are set aside, X = η·B_p·t/κ being what the link brings in one step time, and
    a slot has (K − m·X)/N resident and X prefetched tokens. t depends on the batch and X on t: the
    fixed point is found by iteration (the map is a contraction as long as attention takes less
    than a step; 200 rounds are far beyond convergence). X is at most K/m, and N·X at most the
    `host_tokens` that host memory holds.
    """
    pool_tokens = stage.kv_bytes / stage.kv_token_bytes
    link = stage.efficiencies.link * stage.gpu.link_bytes_s
    batch = pool_tokens / num_slots / mean_context
    prefetched = 0.0
    for _ in range(200 if offload else 0):
        step_s = stage.decode_s(batch, batch * mean_context)
        carried = link * step_s / stage.kv_token_bytes
        prefetched = min(carried, pool_tokens / staging_buffers, host_tokens / num_slots)
        resident = (pool_tokens - staging_buffers * prefetched) / num_slots
        batch = (resident + prefetched) / mean_context
    step_s = stage.decode_s(batch, batch * mean_context)
    return DecodeForecast(batch, step_s, batch / step_s, prefetched)


def end_to_end_tokens_s(
    mean_in: float, mean_out: float, prefill_tokens_s: float, decode_tokens_s: float
) -> float:
    """Prompt and output tokens per second when each request's prefill and decode take their turns:
    (in + out) / (in/R_prefill + out/R_decode)."""
    return (mean_in + mean_out) / (mean_in / prefill_tokens_s + mean_out / decode_tokens_s)
