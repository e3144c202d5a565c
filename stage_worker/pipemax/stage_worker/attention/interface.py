"""What a stage's model needs of its attention, wherever steps' inputs lie."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.messages.control import StepPlan


class Step(Protocol):
    """One step's inputs. Items are packed: their tokens follow each other, without padding between
    them."""

    @property
    def token_ids(self) -> torch.Tensor:
        """int64 [1, rows]"""

    @property
    def position_ids(self) -> torch.Tensor:
        """int64 [1, rows]"""

    @property
    def sample_rows(self) -> torch.Tensor:
        """int64: rows that the last stage makes logits of."""

    @property
    def num_tokens(self) -> int:
        """Rows."""

    @property
    def max_token(self) -> int:
        """The largest of the token ids, known without asking a device."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotation of queries and keys by their positions: a number of the first half of those that
    are rotated turns with the one half a width further on (transformers' `rotate_half`)."""

    cos: torch.Tensor
    """float32 [rows, width], `width` at most the head's size; what is beyond stays as it is."""
    sin: torch.Tensor
    """As `cos`."""


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each head's query and key, before the rotation (Qwen 3)."""

    query_weight: torch.Tensor
    """[head_dim]"""
    key_weight: torch.Tensor
    """[head_dim]"""
    eps: float


class StageAttention(Protocol):
    """Attention over one stage's KV pool, and the step that runs over it."""

    geometry: BlockGeometry
    dtype: torch.dtype

    def bind_pool(self, pool: torch.Tensor) -> None:
        """Takes a contiguous `[num_blocks, layers, 2, block_size, kv_heads, head_dim]` pool."""

    def prepare(self, plan: StepPlan) -> Any:
        """The plan's inputs. Raises WireError when the plan contradicts itself."""

    def warm_up(self) -> None:
        """Compiles what can be compiled without a step."""

    def begin(self, step: Any) -> None:
        """Makes `step`, one of this attention's own, the one that the layers' next calls belong
        to."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """Writes the step's K and V, then attends. query `[rows, heads, head_dim]`, key and value
        `[rows, kv_heads, head_dim]`; the same shape as `query` comes back. `window` 0 is no window,
        `softcap` 0 no soft-cap."""
