"""Our use of FlashInfer, against a stand-in that runs nothing before it is flushed."""

import numpy as np
import pytest
import torch

from pipemax.stage_worker.attention.device import flashinfer_backend
from pipemax.stage_worker.attention.device.batch import DeviceStep
from pipemax.stage_worker.attention.device.flashinfer_backend import FlashInferBackend, obstacle
from pipemax.stage_worker.attention.device.flashinfer_plan import page_columns
from pipemax.stage_worker.attention.device.layout import BatchLayout, pack_step
from pipemax.stage_worker.plan_columns import read_columns
from support import attention_cases, fake_flashinfer
from support.attention_cases import CASES, DECODES, Case, Prepared
from support.paged_run import Item, step_plan

_CPU = torch.device("cpu")
_FITTING = [case for case in CASES if case.dtype != "float32" and case.head_dim in (64, 128, 256)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_backend, "_FLOAT_WORKSPACE_BYTES", 1 << 10)
    monkeypatch.setattr(flashinfer_backend, "_PLAN_BYTES", 1 << 14)
    fake_flashinfer.queue.clear()


class _Flushing(FlashInferBackend):
    """Shows results as soon as they are asked for."""

    def __init__(self, case: Case) -> None:
        heads = case.kv_heads * case.group
        super().__init__(fake_flashinfer, heads, _CPU, fake_flashinfer.write_kv)

    def attend(self, *arguments, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
        out = super().attend(*arguments, **options)
        fake_flashinfer.flush()
        return out


@pytest.mark.parametrize("case", _FITTING, ids=str)
def test_what_is_asked_of_flashinfer_is_attention(case: Case) -> None:
    attention_cases.check(_Flushing(case), case, _CPU)


def _attend(backend: FlashInferBackend, prepared: Prepared, window: int) -> torch.Tensor:
    return backend.attend(
        prepared.step,
        Prepared.LAYER,
        prepared.query,
        prepared.key,
        prepared.value,
        scaling=Prepared.SCALING,
        window=window,
        softcap=0.0,
    )


@pytest.mark.parametrize("padding", [0, 3])
def test_the_host_may_be_many_steps_ahead(padding: int) -> None:
    """Steps of two kinds of layers are planned and queued, and only then does the device start."""
    items = DECODES if padding else attention_cases.MIXED
    cases = [Case("bfloat16", items[k:], padding=padding, seed=k) for k in range(5)]
    steps = [attention_cases.prepare(case, _CPU) for case in cases]
    windowed = [
        attention_cases.prepare(
            Case("bfloat16", items[k:], padding=padding, seed=k, window=7), _CPU
        )
        for k in range(5)
    ]
    backend = FlashInferBackend(fake_flashinfer, 4, _CPU, fake_flashinfer.write_kv)
    backend.bind_pool(steps[0].pool.clone())
    _attend(backend, steps[0], 0)  # both kinds become known
    _attend(backend, steps[0], 7)
    fake_flashinfer.flush()
    found = []
    for step in steps:
        backend.bind_pool(step.pool.clone())
        backend.plan(step.step)
        found.append((_attend(backend, step, 0), _attend(backend, step, 7)))
    fake_flashinfer.flush()
    for (plain, seven), step, narrow in zip(found, steps, windowed, strict=True):
        torch.testing.assert_close(plain.double(), step.expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(seven.double(), narrow.expected, atol=2e-2, rtol=2e-2)


def test_a_replayed_step_is_planned_into_the_same_memory() -> None:
    """A graph is a `run` that was queued once: replayed for another step, it must find that step's
    plan where it found the first one's."""
    first = attention_cases.prepare(Case("bfloat16", DECODES, padding=2), _CPU)
    second = attention_cases.prepare(Case("bfloat16", DECODES[:4], padding=4, seed=9), _CPU)
    batch = first.step.batch
    backend = FlashInferBackend(fake_flashinfer, 4, _CPU, fake_flashinfer.write_kv)
    backend.bind_pool(first.pool.clone())
    backend.plan(first.step)
    _attend(backend, first, 0)
    fake_flashinfer.flush()
    out = _attend(backend, first, 0)
    graph = list(fake_flashinfer.queue)[1:]  # without writing K and V
    fake_flashinfer.flush()
    torch.testing.assert_close(out.double(), first.expected, atol=2e-2, rtol=2e-2)

    assert second.step.batch.layout.rows == batch.layout.rows
    pool = backend._pool
    assert pool is not None
    pool[: second.pool_after.shape[0]] = second.pool_after
    first.query.copy_(second.query)
    backend.plan(DeviceStep(batch, second.step.columns))
    fake_flashinfer.queue.extend(graph)
    fake_flashinfer.flush()
    torch.testing.assert_close(out[:4].double(), second.expected[:4], atol=2e-2, rtol=2e-2)


def test_plans_take_turns_with_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_backend, "_PLANS_UNDER_WAY", 3)
    ring = flashinfer_backend._PinnedRing(_CPU)
    seen = []
    for _ in range(7):
        with ring.lend() as memory:
            seen.append(memory.data_ptr())
    assert len(set(seen[:3])) == 3
    assert seen[3:6] == seen[:3]
    assert seen[6] == seen[0]


def test_pages_without_tokens_are_left_out() -> None:
    items = [Item([1], 16, [5, 6, 7]), Item([1, 2], 0, [9]), Item([1], 15, [3, 4])]
    columns = read_columns(step_plan(items), 16)
    pages = page_columns(columns, BatchLayout.of_step(columns, 16), 16)
    assert pages.pages.tolist() == [5, 6, 9, 3]
    assert pages.page_starts.tolist() == [0, 2, 3, 4]
    assert pages.last_page_tokens.tolist() == [1, 2, 16]
    assert pages.seq_lens.tolist() == [17, 2, 16]
    assert pages.query_starts.tolist() == [0, 1, 3, 4]
    assert {column.dtype for column in (pages.pages, pages.page_starts, pages.seq_lens)} == {
        np.dtype(np.int32)
    }


def test_padding_has_rows_and_no_pages() -> None:
    columns = read_columns(step_plan([Item([1], 16, [5, 6]), Item([1], 0, [9])]), 16)
    layout = BatchLayout.of_decodes(4, 100)
    pack_step(columns, layout, 16, np.empty(layout.num_bytes, np.uint8))
    pages = page_columns(columns, layout, 16)
    assert pages.pages.tolist() == [5, 6, 9]
    assert pages.page_starts.tolist() == [0, 2, 3, 3, 3]
    assert pages.last_page_tokens.tolist() == [1, 1, 0, 0]
    assert pages.query_starts.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 128, "no float32 kernels"),
        (torch.bfloat16, 80, "heads of 64, 128, 256, not 80"),
        (torch.float16, 64, None),
    ],
)
def test_what_flashinfer_cannot_do_is_known(
    dtype: torch.dtype, head_dim: int, reason: str | None
) -> None:
    found = obstacle(fake_flashinfer, dtype, head_dim)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_another_flashinfer_is_refused() -> None:
    found = obstacle(object(), torch.bfloat16, 128)
    assert found is not None
    assert "BatchPrefillWithPagedKVCacheWrapper" in found
