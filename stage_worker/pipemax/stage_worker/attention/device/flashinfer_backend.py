"""Attention by FlashInfer, where it is installed: one call for decodes and prompts together.

Our pool, one layer of it, is what FlashInfer calls a paged KV cache of layout NHD, with pages that
are far apart: it reads K and V through their strides, pages by 64-bit offsets. Checked against
FlashInfer 0.7.2 by reading it: `BatchPrefillWithPagedKVCacheWrapper`, backend fa2.

FlashInfer plans each step on the host and copies the plan to the device. Its plan lies in pinned
memory that the wrapper would write to again while an earlier step's copy is still to come, for the
host runs ahead of the device here; so every plan gets pinned memory of its own from a ring.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import torch

from pipemax.proto.errors import InvariantError
from pipemax.stage_worker.attention.device.batch import DeviceBatch, DeviceStep
from pipemax.stage_worker.attention.device.flashinfer_plan import PageColumns, page_columns

HEAD_DIMS: Final = (64, 128, 256)
_FLOAT_WORKSPACE_BYTES: Final = 256 << 20
"""For the partial results of split contexts; one for all, since kernels run one after another."""
_PLAN_BYTES: Final = 8 << 20
"""What a wrapper makes room for by default."""
_PLANS_UNDER_WAY: Final = 16
_PINNED: Final = "_pin_memory_int_workspace_buffer"
"""Where a wrapper keeps the pinned memory of its plan. Not a public name, so it is looked for."""


WriteKv: TypeAlias = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""See `write.write_kv`."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """What FlashInfer must know when it plans. A model has one or two of them."""

    scaling: float
    window: int
    softcap: float


class FlashInferBackend:
    """See AttentionBackend."""

    name = "flashinfer"
    graphs = True

    def __init__(
        self, flashinfer: Any, num_heads: int, device: torch.device, write_kv: WriteKv
    ) -> None:
        """`flashinfer`: the package."""
        self._flashinfer = flashinfer
        self._write_kv = write_kv
        self._num_heads = num_heads
        self._device = device
        self._workspace = torch.zeros(_FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._pinned = _PinnedRing(device)
        self._pool: torch.Tensor | None = None
        self._plan_memory: dict[_Settings, torch.Tensor] = {}
        """On the device; for all wrappers of these settings: each is planned right before it
        runs."""
        self._eager: dict[_Settings, Any] = {}
        self._recorded: WeakKeyDictionary[DeviceBatch, dict[_Settings, Any]] = WeakKeyDictionary()
        """A graph needs a wrapper whose device memory stays where it is."""

    def bind_pool(self, pool: torch.Tensor) -> None:
        self._pool = pool

    def plan(self, step: DeviceStep) -> None:
        pages = self._pages(step)
        for settings in self._plan_memory:
            self._plan(step, settings, pages)

    def attend(
        self,
        step: DeviceStep,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        if self._pool is None:
            raise InvariantError("attention before a pool was bound")
        self._write_kv(self._pool, layer, step.batch.slots, key, value)
        settings = _Settings(scaling, window, softcap)
        if settings not in self._plan_memory:  # the first layer of its kind in the first step
            self._plan_memory[settings] = torch.empty(
                _PLAN_BYTES, dtype=torch.uint8, device=self._device
            )
            self._plan(step, settings, self._pages(step))
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        wrapper = self._wrapper(step.batch, settings)
        wrapper.run(query, (self._pool[:, layer, 0], self._pool[:, layer, 1]), out=out)
        return out

    def _pages(self, step: DeviceStep) -> PageColumns:
        assert self._pool is not None
        return page_columns(step.columns, step.batch.layout, self._pool.shape[3])

    def _plan(self, step: DeviceStep, settings: _Settings, pages: PageColumns) -> None:
        assert self._pool is not None
        wrapper = self._wrapper(step.batch, settings)
        with self._pinned.lend() as memory:
            setattr(wrapper, _PINNED, memory)
            wrapper.plan(
                self._upload(pages.query_starts),
                self._upload(pages.page_starts),
                self._upload(pages.pages).to(self._device, non_blocking=True),
                self._upload(pages.last_page_tokens),
                self._num_heads,
                self._pool.shape[4],
                self._pool.shape[5],
                self._pool.shape[3],
                causal=True,
                sm_scale=settings.scaling,
                window_left=settings.window - 1,  # -1 is no window, 0 sees the token itself
                logits_soft_cap=settings.softcap,
                q_data_type=self._pool.dtype,
                kv_data_type=self._pool.dtype,
                seq_lens=self._upload(pages.seq_lens),
            )

    def _wrapper(self, batch: DeviceBatch, settings: _Settings) -> Any:
        if not batch.layout.fixed:
            if settings not in self._eager:
                self._eager[settings] = self._open(settings)
            return self._eager[settings]
        wrappers = self._recorded.setdefault(batch, {})
        if settings not in wrappers:
            items = batch.layout.items

            def buffer(length: int) -> torch.Tensor:
                return torch.zeros(length, dtype=torch.int32, device=self._device)

            wrappers[settings] = self._open(
                settings,
                use_cuda_graph=True,
                qo_indptr_buf=buffer(items + 1),
                paged_kv_indptr_buf=buffer(items + 1),
                paged_kv_indices_buf=buffer(batch.layout.table_blocks),
                paged_kv_last_page_len_buf=buffer(items),
            )
        return wrappers[settings]

    def _open(self, settings: _Settings, **options: Any) -> Any:
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "NHD", backend="fa2", **options
        )
        wrapper.reset_workspace_buffer(self._workspace, self._plan_memory[settings])
        if not hasattr(wrapper, _PINNED):
            raise InvariantError(f"this version of flashinfer has no {_PINNED}")
        return wrapper

    def _upload(self, column: Any) -> torch.Tensor:
        """In pinned memory, from where a copy to the device does not wait. torch keeps it until
        such copies are over."""
        tensor = torch.from_numpy(column)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


class _PinnedRing:
    """Pinned memory for plans that the device is still to read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: deque[tuple[torch.Tensor, Any]] = deque()
        """Longest lent first, each with the event behind the copy from it."""

    def lend(self) -> "_Lent":
        if len(self._idle) < _PLANS_UNDER_WAY:
            pinned = self._device.type == "cuda"
            memory = torch.empty(_PLAN_BYTES, dtype=torch.uint8, pin_memory=pinned)
            event = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
            return _Lent(self, memory, event)
        memory, read = self._idle.popleft()
        if read is not None:
            read.synchronize()  # of a step that is long over
        return _Lent(self, memory, read)

    def take_back(self, memory: torch.Tensor, read: Any) -> None:
        if read is not None:
            read.record()
        self._idle.append((memory, read))


@dataclass(frozen=True, slots=True)
class _Lent:
    """For a `with`: the memory within, and the ring's again behind what was queued there."""

    ring: _PinnedRing
    memory: torch.Tensor
    read: Any

    def __enter__(self) -> torch.Tensor:
        return self.memory

    def __exit__(self, *error: object) -> None:
        self.ring.take_back(self.memory, self.read)


def obstacle(flashinfer: Any, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this FlashInfer cannot run a model, in words; None: nothing is known against it."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {str(dtype).removeprefix('torch.')} kernels"
    if head_dim not in HEAD_DIMS:
        return f"its kernels are for heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if not hasattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper"):
        return "this version has no BatchPrefillWithPagedKVCacheWrapper"
    return None
