"""From logits to tokens."""

from pipemax.stage_worker.sampling.draw import is_plain_greedy, sample
from pipemax.stage_worker.sampling.sampler import Sampled, Sampler

__all__ = ["Sampled", "Sampler", "is_plain_greedy", "sample"]
