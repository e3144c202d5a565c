"""How much of a GPU is left for the KV pool of one stage."""

from dataclasses import dataclass
from typing import Final

from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.control import SampleRow, StepPlan
from pipemax.proto.messages.types import pack_i32
from pipemax.proto.sizes import format_size

CONTEXT_BYTES: Final = 600 * 2**20
"""What CUDA itself takes of a GPU for one process, about, with torch's kernels loaded. Assumed
where several stages share the GPU: what each of them takes cannot be told apart."""
GRAPH_BYTES: Final = 4 * 2**20
"""What the driver keeps of one graph, besides the memory its kernels use; assumed likewise."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Of one stage's GPU, bytes."""

    total_bytes: int
    utilization: float
    """Share that all stages on this GPU may take together."""
    stages: int
    """On this GPU; all get the same part."""
    weights_bytes: int
    step_bytes: int
    """What torch holds besides weights during the largest step."""
    buffer_bytes: int
    """Inputs, results and activations of steps in flight."""
    graph_bytes: int
    context_bytes: int
    """What CUDA takes for itself; with one stage on the GPU, whatever other processes take too."""

    @property
    def pool_bytes(self) -> int:
        """What is left for KV; negative when nothing is."""
        allowed = int(self.utilization * self.total_bytes) // self.stages
        return allowed - (
            self.weights_bytes
            + self.step_bytes
            + self.buffer_bytes
            + self.graph_bytes
            + self.context_bytes
        )

    def __str__(self) -> str:
        parts = {
            "weights": self.weights_bytes,
            "the largest step": self.step_bytes,
            "buffers": self.buffer_bytes,
            "CUDA graphs": self.graph_bytes,
            "CUDA itself and others": self.context_bytes,
        }
        taken = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
        part = f" among {self.stages} stages" if self.stages > 1 else ""
        return (
            f"{self.utilization:.0%} of {format_size(self.total_bytes)}{part}, less {taken}, "
            f"leaves {format_size(max(0, self.pool_bytes))}"
        )


def blocks_left(use: MemoryUse, block_bytes: int, request_blocks: int, stage: int) -> int:
    """Blocks of the KV pool. Raises ConfigError when they are too few for one request of the
    greatest length, `request_blocks`."""
    num_blocks = max(0, use.pool_bytes) // block_bytes
    if num_blocks < request_blocks:
        raise ConfigError(
            f"stage {stage} has no room for the KV of one request of --max-model-len: "
            f"{request_blocks} blocks, {format_size(request_blocks * block_bytes)}. "
            f"--gpu-memory-utilization {use}. Raise it, lower --max-model-len, --max-num-seqs or "
            "--max-num-batched-tokens, or spread the model over more GPUs"
        )
    return num_blocks


def largest_step(
    max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int
) -> StepPlan:
    """As many tokens as a step may have, of as many requests, each of which is sampled. They share
    blocks: nobody looks at what comes out."""
    items = min(max_num_seqs, max_num_batched_tokens)
    each, more = divmod(max_num_batched_tokens, items)
    tokens = [min(max_model_len, each + (item < more)) for item in range(items)]
    blocks = [blocks_for(count, block_size) for count in tokens]
    return StepPlan(
        epoch=0,
        step=0,
        slot=0,
        wait_for_load=False,
        num_tokens=pack_i32(tokens),
        context_lens=pack_i32([0] * items),
        block_counts=pack_i32(blocks),
        block_tables=pack_i32([block for count in blocks for block in range(count)]),
        token_ids=pack_i32([0] * sum(tokens)),
        sample=tuple(SampleRow(item, 0, 0, 0.0, 0, 1.0, 0.0) for item in range(items)),
    )
