"""Shapes of KV blocks. A block is one copy; neighbouring blocks are one larger copy."""

from dataclasses import dataclass
from typing import Final, Literal

Dtype = Literal["float32", "bfloat16", "float16"]

DTYPE_BYTES: Final[dict[Dtype, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """One stage's KV block: `[num_layers, 2, block_size, num_kv_heads, head_dim]`, contiguous.

    The device pool is `[num_blocks, *block]` ("block-first"): all layers of a block lie together,
    so that moving one block is one copy. Index 0 of the axis of length two is K, index 1 is V.
    """

    num_layers: int
    block_size: int
    """Tokens per block."""
    num_kv_heads: int
    head_dim: int
    dtype: Dtype

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token on this stage: 2 · layers · kv_heads · head_dim · itemsize."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def split_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage, as even as can be; earlier stages take the remainder.

    The last stage also owns the final norm and the LM head, so it gets the smaller share.
    """
    share, extra = divmod(num_layers, num_stages)
    return tuple(share + (1 if stage < extra else 0) for stage in range(num_stages))
