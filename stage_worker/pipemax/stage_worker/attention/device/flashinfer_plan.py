"""A step as FlashInfer wants it: rows, pages and what is in the last page, item after item. NumPy
only."""

from dataclasses import dataclass

import numpy as np

from pipemax.stage_worker.attention.device.layout import BatchLayout
from pipemax.stage_worker.plan_columns import I32Array, PlanColumns


@dataclass(frozen=True, slots=True)
class PageColumns:
    """All int32. An item of padding has a row and no pages."""

    query_starts: I32Array
    """[items + 1]"""
    page_starts: I32Array
    """[items + 1] where each item's pages begin in `pages`."""
    pages: I32Array
    """Those of the device blocks that hold tokens: a plan may name more."""
    last_page_tokens: I32Array
    """[items]"""
    seq_lens: I32Array
    """[items]"""


def page_columns(columns: PlanColumns, layout: BatchLayout, block_size: int) -> PageColumns:
    """`columns` in the order of a batch of this layout, padding included."""
    items = columns.num_tokens.shape[0]
    padding = layout.items - items
    seq_lens = np.zeros(layout.items, np.int32)
    seq_lens[:items] = columns.context_lens + columns.num_tokens
    counts = -(-seq_lens // block_size)
    page_starts = _starts(counts)
    # Each page's place in the plan's block tables: its item's begin, and its place in the item.
    shift = columns.table_starts - page_starts[:items]
    places = np.arange(page_starts[-1]) + np.repeat(shift, counts[:items])
    rows = np.concatenate([columns.num_tokens, np.ones(padding, np.int32)])
    return PageColumns(
        query_starts=_starts(rows),
        page_starts=page_starts,
        pages=columns.block_tables[places],
        last_page_tokens=np.where(seq_lens > 0, (seq_lens - 1) % block_size + 1, 0).astype(
            np.int32
        ),
        seq_lens=seq_lens,
    )


def _starts(counts: I32Array) -> I32Array:
    starts = np.zeros(counts.shape[0] + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts
