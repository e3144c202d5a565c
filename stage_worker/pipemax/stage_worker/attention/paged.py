"""Paged attention of one stage, and its place in transformers' attention interface."""

from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipemax.proto.errors import InvariantError
from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.attention import kernels, rotation
from pipemax.stage_worker.attention.interface import HeadNorm, Rotary, StageAttention
from pipemax.stage_worker.attention.reference import reference_attention
from pipemax.stage_worker.batch import Runs, StepBatch, prepare_batch
from pipemax.stage_worker.compiled import one_compiler_at_a_time

IMPLEMENTATION: Final = "pipemax_paged"
"""The name in `attn_implementation`."""
Backend: TypeAlias = Literal["kernel", "widening_kernel", "reference"]
"""The kernel multiplies bfloat16 as it is where the CPU can; the widening one never does."""

_AS_NUMPY: Final = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.uint16,
}


class PagedAttention:
    """The KV pool of one stage and the step that runs over it.

    Each StageModel has its own, hung on its attention modules as a `PagedLayer`, so that two models
    in one process share nothing.
    """

    def __init__(self, geometry: BlockGeometry, dtype: torch.dtype, backend: Backend) -> None:
        self.geometry = geometry
        self.dtype = dtype
        self.backend = backend
        self._pool: torch.Tensor | None = None
        self._batch: StepBatch | None = None
        self._threads = torch.get_num_threads()

    def bind_pool(self, pool: torch.Tensor) -> None:
        """Takes a contiguous `[num_blocks, layers, 2, block_size, kv_heads, head_dim]` pool."""
        if pool.dim() != 6 or tuple(pool.shape[1:]) != self.geometry.block_shape:
            raise InvariantError(
                f"pool of shape {tuple(pool.shape)} for blocks of {self.geometry.block_shape}"
            )
        if pool.dtype != self.dtype or not pool.is_contiguous():
            raise InvariantError(f"pool of {pool.dtype}, contiguous {pool.is_contiguous()}")
        self._pool = pool
        self._array = pool_array(pool)

    def prepare(self, plan: StepPlan) -> StepBatch:
        """The plan's inputs. Raises WireError when the plan contradicts itself."""
        return prepare_batch(plan, self.geometry.block_size)

    def warm_up(self) -> None:
        """See the function of this name."""
        warm_up(self.dtype)

    def begin(self, batch: StepBatch) -> None:
        """Makes `batch` the step that the layers' next calls belong to."""
        if self._pool is None:
            raise InvariantError("a step before the pool was bound")
        if batch.block_size != self.geometry.block_size:
            raise InvariantError(f"a step with blocks of {batch.block_size} tokens")
        if batch.max_block >= self._pool.shape[0]:
            raise InvariantError(
                f"block {batch.max_block} of a pool of {self._pool.shape[0]} blocks"
            )
        self._batch = batch
        self._threads = torch.get_num_threads()

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
        """Writes the step's K and V, then attends. query `[T, heads, head_dim]`, key and value
        `[T, kv_heads, head_dim]`; the same shape as `query` comes back."""
        batch, _ = self._step()
        # The kernels check no bounds.
        expected = (batch.num_tokens, self.geometry.num_kv_heads, self.geometry.head_dim)
        if key.shape != expected or value.shape != expected:
            raise InvariantError(
                f"K of shape {tuple(key.shape)} and V of {tuple(value.shape)}, not {expected}"
            )
        rotation.write_kv(self._array, layer, pool_array(key), pool_array(value), batch.slots)
        return self._attend(layer, query.contiguous(), query.shape[1], scaling, window, softcap)

    def attend_packed(
        self,
        layer: int,
        qkv: torch.Tensor,
        rotary: Rotary,
        *,
        scaling: float,
        window: int,
        head_norm: HeadNorm | None = None,
    ) -> torch.Tensor:
        """`attend` on what one product of a fused projection gives: `qkv` `[T, (heads + 2 ·
        kv_heads) · head_dim]`, queries, keys, values, contiguous and of this stage's dtype; it is
        overwritten. Normalises and rotates as transformers' modules do, rounding where they do.
        Returns `[T, heads · head_dim]`. `window` 0 is no window."""
        batch, _ = self._step()
        kv_heads, head_dim = self.geometry.num_kv_heads, self.geometry.head_dim
        heads = qkv.shape[-1] // head_dim - 2 * kv_heads
        shape = (batch.num_tokens, (heads + 2 * kv_heads) * head_dim)
        if (
            qkv.shape != shape
            or heads < kv_heads
            or heads % kv_heads
            or qkv.dtype != self.dtype
            or not qkv.is_contiguous()
        ):
            raise InvariantError(
                f"queries, keys and values of shape {tuple(qkv.shape)} in {qkv.dtype}, contiguous "
                f"{qkv.is_contiguous()}, for {batch.num_tokens} tokens, {kv_heads} KV heads of "
                f"{head_dim} in {self.dtype}"
            )
        packed = qkv.view(batch.num_tokens, -1, head_dim)
        query_weight, key_weight = _norm_weights(head_norm, head_dim)
        rotation.rotate_and_write(
            self._array,
            layer,
            pool_array(packed),
            _rotation(rotary.cos, batch.num_tokens, head_dim),
            _rotation(rotary.sin, batch.num_tokens, head_dim),
            query_weight,
            key_weight,
            np.float32(head_norm.eps if head_norm else 0.0),
            batch.slots,
        )
        return self._attend(layer, packed, heads, scaling, window, 0.0).flatten(1)

    def _step(self) -> tuple[StepBatch, torch.Tensor]:
        if self._batch is None or self._pool is None:
            raise InvariantError("attention outside a step")
        return self._batch, self._pool

    def _attend(
        self,
        layer: int,
        packed: torch.Tensor,
        heads: int,
        scaling: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """The queries are the first `heads` of `packed` `[T, at least heads, head_dim]`; K and V of
        the step are in the pool."""
        batch, pool = self._step()
        if self.backend == "reference":
            query = packed[:, :heads]
            return reference_attention(
                pool, layer, batch, query, scaling=scaling, softcap=softcap, window=window
            )
        out = torch.empty(packed.shape[0], heads, packed.shape[2], dtype=packed.dtype)
        kernels.attend(
            self._array,
            layer,
            pool_array(packed),
            heads,
            batch.runs,
            scaling=scaling,
            softcap=softcap,
            window=window,
            out=pool_array(out),
            threads=self._threads,
            pairs=self.backend == "kernel",
        )
        return out


class PagedLayer:
    """What an attention module needs to find its part of the pool."""

    def __init__(self, attention: StageAttention, layer: int) -> None:
        self.attention = attention
        self.layer = layer
        """Within the stage."""


def pool_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A NumPy view of a contiguous tensor, 16-bit floats as the integers `kernels` expects."""
    return tensor.contiguous().view(_AS_NUMPY[tensor.dtype]).numpy()


def _rotation(numbers: torch.Tensor, rows: int, head_dim: int) -> npt.NDArray[np.float32]:
    width = numbers.shape[-1]
    if numbers.shape != (rows, width) or width > head_dim or width % 2:
        raise InvariantError(
            f"a rotation of shape {tuple(numbers.shape)} for {rows} tokens and heads of {head_dim}"
        )
    return numbers.float().contiguous().numpy()


def _norm_weights(
    head_norm: HeadNorm | None, head_dim: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Of queries and keys; empty for None."""
    if head_norm is None:
        return np.empty(0, np.float32), np.empty(0, np.float32)
    weights = head_norm.query_weight, head_norm.key_weight
    if any(weight.shape != (head_dim,) for weight in weights):
        raise InvariantError(f"norms of shape {tuple(weights[0].shape)} for heads of {head_dim}")
    query, key = (weight.detach().float().contiguous().numpy() for weight in weights)
    return query, key


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query `[1, heads, T, head_dim]`, key and value
    `[1, kv_heads, T, head_dim]`; returns `[1, T, heads, head_dim]`."""
    if attention_mask is not None or dropout:
        raise InvariantError("paged attention takes neither a mask nor dropout")
    paged: PagedLayer = module.paged_layer  # type: ignore[assignment]
    out = paged.attention.attend(
        paged.layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out[None], None


def register() -> None:
    """Makes IMPLEMENTATION known to transformers; doing it again changes nothing.

    There is no mask function of this name: transformers then makes no mask and, unlike with one
    that returns None, does not look at the position ids, for which a host would wait for its GPU.
    """
    from transformers import AttentionInterface  # takes seconds, and not every model needs it

    AttentionInterface.register(IMPLEMENTATION, paged_attention)


def warm_up(dtype: torch.dtype) -> None:
    """Compiles the kernels for `dtype` and the current number of threads, or loads them from the
    cache on disk, so that the first step does not wait for it."""
    pool = pool_array(torch.zeros(1, 1, 2, 8, 1, 8, dtype=dtype))
    rows = torch.zeros(1, 1, 8, dtype=dtype)
    slots, zero = np.zeros(1, np.int64), np.zeros(1, np.int32)
    angles, weight = np.zeros((1, 8), np.float32), np.empty(0, np.float32)
    packed = pool_array(torch.zeros(1, 3, 8, dtype=dtype))
    with one_compiler_at_a_time(kernels.attend_part):
        rotation.write_kv(pool, 0, pool_array(rows), pool_array(rows), slots)
        rotation.rotate_and_write(
            pool, 0, packed, angles, angles, weight, weight, np.float32(0.0), slots
        )
        kernels.attend(
            pool,
            0,
            packed,
            1,
            Runs(slots, zero + np.int32(1), zero, zero, zero),
            scaling=1.0,
            softcap=0.0,
            window=0,
            out=pool_array(rows),
            threads=torch.get_num_threads(),
            pairs=True,
        )
