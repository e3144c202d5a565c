import math

from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.geometry import DTYPE_BYTES, BlockGeometry, blocks_for, split_layers


def test_block_of_llama_70b_stage() -> None:
    """10 layers, 8 KV heads of 128, bfloat16: 40 KiB a token, 640 KiB a block of 16."""
    geometry = BlockGeometry(
        num_layers=10, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16"
    )
    assert geometry.token_bytes == 40 * 2**10
    assert geometry.block_bytes == 640 * 2**10
    assert geometry.block_shape == (10, 2, 16, 8, 128)


@given(
    st.builds(
        BlockGeometry,
        num_layers=st.integers(1, 100),
        block_size=st.integers(1, 256),
        num_kv_heads=st.integers(1, 64),
        head_dim=st.integers(1, 256),
        dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    )
)
def test_block_bytes_are_those_of_its_shape(geometry: BlockGeometry) -> None:
    assert geometry.block_bytes == math.prod(geometry.block_shape) * DTYPE_BYTES[geometry.dtype]


@given(st.integers(0, 10**6), st.integers(1, 256))
def test_blocks_are_as_few_as_hold_the_tokens(num_tokens: int, block_size: int) -> None:
    blocks = blocks_for(num_tokens, block_size)
    assert blocks * block_size >= num_tokens
    assert (blocks - 1) * block_size < num_tokens


@given(st.integers(1, 200), st.integers(1, 16))
def test_layers_are_split_evenly_and_the_last_stage_has_no_more(layers: int, stages: int) -> None:
    split = split_layers(layers, stages)
    assert len(split) == stages
    assert sum(split) == layers
    assert max(split) - min(split) <= 1
    assert split[-1] == min(split)
