"""What PipeMax uses of FlashInfer, as strict, on a CPU. Nothing runs until `flush`: the host is
ahead of the device, as it is with a GPU, so memory that is written to again too early shows."""

from collections.abc import Callable
from typing import Any

import torch

_HEADER = 8
"""int64: items, then where each column begins."""

queue: list[Callable[[], Any]] = []


def flush() -> None:
    for run in queue:
        run()
    queue.clear()


def write_kv(
    pool: torch.Tensor, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    def write() -> None:
        real = slots >= 0
        at = (slots[real] // pool.shape[3], slots[real] % pool.shape[3])
        pool[:, layer, 0].index_put_(at, key[real])
        pool[:, layer, 1].index_put_(at, value[real])

    queue.append(write)


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert kv_layout == "NHD"
        assert backend == "fa2"
        self._graph = use_cuda_graph
        self._buffers = (
            qo_indptr_buf,
            paged_kv_indptr_buf,
            paged_kv_indices_buf,
            paged_kv_last_page_len_buf,
        )
        self._rows = -1
        if use_cuda_graph:
            assert all(buffer is not None for buffer in self._buffers)

    def reset_workspace_buffer(self, float_workspace: torch.Tensor, plan: torch.Tensor) -> None:
        assert float_workspace.data_ptr() % 16 == 0
        self._plan_memory = plan
        self._pin_memory_int_workspace_buffer = torch.empty(plan.shape, dtype=plan.dtype)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        seq_lens: torch.Tensor,
    ) -> None:
        columns = [qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len]
        assert all(column.dtype == torch.int32 for column in columns)
        assert causal
        self._how = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._settings = (sm_scale, window_left, logits_soft_cap, q_data_type, kv_data_type)
        pages = paged_kv_indptr.diff()
        assert torch.equal(
            torch.where(pages > 0, (pages - 1) * page_size + paged_kv_last_page_len, 0), seq_lens
        )
        if self._graph:
            self._copy_into_fixed_buffers(columns)
        else:
            self._buffers = tuple(columns)
        # The plan goes through pinned memory, which is read when the device gets there.
        numbers = torch.cat([qo_indptr.long(), seq_lens.long()])
        size = 8 * (_HEADER + numbers.shape[0])
        pinned, plan = self._pin_memory_int_workspace_buffer, self._plan_memory
        words = pinned[:size].view(torch.int64)
        words[0] = qo_indptr.shape[0]
        words[_HEADER:] = numbers
        queue.append(lambda: plan[:size].copy_(pinned[:size]))

    def _copy_into_fixed_buffers(self, columns: list[torch.Tensor]) -> None:
        rows = int(columns[0][-1])
        assert self._rows in (-1, rows), "rows of a recorded wrapper changed"
        self._rows = rows
        for buffer, column in zip(self._buffers, columns, strict=True):
            assert buffer is not None
            assert column.shape[0] <= buffer.shape[0]
            if column is not columns[2]:
                assert column.shape == buffer.shape
            target = buffer[: column.shape[0]]
            queue.append(lambda target=target, column=column: target.copy_(column))  # type: ignore[misc]

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
    ) -> None:
        """Reads what was planned from device memory, as a recorded kernel does."""
        buffers, plan, how, settings = self._buffers, self._plan_memory, self._how, self._settings
        queue.append(lambda: _run(q, paged_kv_cache, out, buffers, plan, how, settings))


def _run(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    buffers: Any,
    plan: torch.Tensor,
    how: tuple[int, int, int, int],
    settings: tuple[float, int, float, torch.dtype, torch.dtype],
) -> None:
    heads, kv_heads, head_dim, page_size = how
    scale, window_left, softcap, q_type, kv_type = settings
    keys, values = cache
    assert q.shape[1:] == (heads, head_dim)
    assert keys.shape[1:] == values.shape[1:] == (page_size, kv_heads, head_dim)
    assert (q.dtype, keys.dtype) == (q_type, kv_type)
    words = plan.view(torch.int64)
    items = int(words[0]) - 1
    starts = words[_HEADER : _HEADER + items + 1].tolist()
    lengths = words[_HEADER + items + 1 : _HEADER + 2 * items + 1].tolist()
    page_starts, pages = buffers[1].tolist(), buffers[2]
    assert buffers[0].tolist() == starts
    for item in range(items):
        rows = slice(starts[item], starts[item + 1])
        own = pages[page_starts[item] : page_starts[item + 1]]
        k = keys[own].flatten(0, 1)[: lengths[item]].double()
        v = values[own].flatten(0, 1)[: lengths[item]].double()
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        count = starts[item + 1] - starts[item]
        at = torch.arange(lengths[item] - count, lengths[item])[:, None]
        key_at = torch.arange(lengths[item])[None]
        hidden = key_at > at
        if window_left >= 0:
            hidden |= key_at < at - window_left
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(out.dtype)
