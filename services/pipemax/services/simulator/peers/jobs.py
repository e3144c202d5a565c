"""Requests and KV blocks of the models of peers."""

from collections.abc import Iterable
from dataclasses import dataclass

from pipemax.proto.errors import ConfigError, InvariantError
from pipemax.proto.geometry import blocks_for
from pipemax.services.simulator.spec import SimulationSpec
from pipemax.stage_worker.modelled.roofline import StepLoad


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way. Its KV always covers its first `computed` tokens."""

    key: int
    prompt_tokens: int
    output_tokens: int
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    """Held in the pool it is in."""

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one is sampled: 1 in decode."""
        return self.prompt_tokens + self.generated - self.computed

    @property
    def in_decode(self) -> bool:
        """Its prompt is computed, and what it generated so far."""
        return self.generated > 0 and self.missing == 1

    @property
    def finished(self) -> bool:
        return self.generated == self.output_tokens


Part = tuple[Job, int]
"""A request's part in a step: so many of its tokens are computed."""


def make_jobs(spec: SimulationSpec) -> list[Job]:
    """The workload, first come first."""
    return [
        Job(key, lengths.prompt_tokens, lengths.output_tokens)
        for key, lengths in enumerate(spec.workload.requests)
    ]


def load_of_parts(parts: Iterable[Part]) -> StepLoad:
    """What a step's time depends on. One token is a decode item, more are a prompt's chunk."""
    rows = context = prompt = pairs = before = 0
    for job, tokens in parts:
        if tokens == 1:
            rows += 1
            context += job.computed + 1
        else:
            prompt += tokens
            before += job.computed
            pairs += tokens * job.computed + tokens * (tokens + 1) // 2
    return StepLoad(rows, context, prompt, pairs, before)


class Pool:
    """Blocks of KV, counted."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.used = 0

    @property
    def free(self) -> int:
        return self.num_blocks - self.used

    def wants(self, job: Job, tokens: int) -> int:
        """Further blocks `job` needs to hold `tokens` tokens."""
        return max(0, blocks_for(tokens, self.block_size) - job.blocks)

    def take(self, job: Job, tokens: int) -> None:
        """Room for `tokens` tokens. Raises InvariantError when there is none."""
        wanted = self.wants(job, tokens)
        if wanted > self.free:
            raise InvariantError(f"{wanted} blocks are taken, {self.free} are free")
        self.used += wanted
        job.blocks += wanted

    def give_back(self, job: Job) -> None:
        self.used -= job.blocks
        job.blocks = 0

    def check_holds(self, spec: SimulationSpec, whose: str) -> None:
        """Raises ConfigError when the longest request alone does not fit."""
        needed = blocks_for(spec.workload.max_model_len, self.block_size)
        if needed > self.num_blocks:
            raise ConfigError(
                f"the longest request needs {needed} blocks of KV, the {whose} has "
                f"{self.num_blocks} for it: use more GPUs, or leave it out of --against"
            )
