"""A step of the modelled device: reads and checks real blocks, takes as long as the GPU would."""

from dataclasses import dataclass
from typing import cast

import numpy as np

from pipemax.proto.errors import InvariantError, WireError
from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.channels.ring import Rows
from pipemax.stage_worker.executor import StepResult
from pipemax.stage_worker.modelled.kv import ContextSlots, ModelledPool, continue_with
from pipemax.stage_worker.modelled.loads import load_of
from pipemax.stage_worker.modelled.marks import U64Array, made_up_tokens
from pipemax.stage_worker.modelled.pace import Pace
from pipemax.stage_worker.modelled.ring import ROW_NUMBERS
from pipemax.stage_worker.modelled.roofline import StageModel
from pipemax.stage_worker.plan_columns import PlanColumns, read_columns

_NS = 1e9


@dataclass(frozen=True, slots=True)
class ModelledBatch:
    """What a step needs beside its blocks."""

    columns: PlanColumns
    context: ContextSlots
    compute_s: float
    """Of this machine's time."""
    hop_s: float
    """The same for its rows' way to the next stage."""


class ModelledStep:
    """Implements `executor.StepWork`."""

    def __init__(
        self,
        stage: int,
        model: StageModel,
        pool: ModelledPool,
        pace: Pace,
        *,
        is_last: bool,
        vocab_size: int,
        time_scale: float,
    ) -> None:
        self._stage = stage
        self._model = model
        self._pool = pool
        self._pace = pace
        self._is_last = is_last
        self._vocab_size = vocab_size
        self._time_scale = time_scale

    def prepare(self, plan: StepPlan) -> ModelledBatch:
        columns = read_columns(plan, self._pool.block_size)
        if columns.max_block >= self._pool.num_blocks:
            raise WireError(
                "bad_plan",
                f"step {plan.step} uses block {columns.max_block}; this pool has "
                f"{self._pool.num_blocks}",
            )
        model = self._model
        hop_s = model.hop_bytes(len(columns.token_ids)) / model.gpu.link_bytes_s
        return ModelledBatch(
            columns,
            ContextSlots.of(columns, self._pool.block_size),
            self._time_scale * model.step_s(load_of(plan)),
            self._time_scale * hop_s,
        )

    def await_rows(self, rows: Rows) -> None:
        self._pace.wait_until(_arrival_s(cast(U64Array, rows)))

    def compute(self, plan: StepPlan, batch: ModelledBatch, rows: Rows | None) -> StepResult:
        """Raises WrongKvError or InvariantError when blocks or rows are not what they must be,
        before the step or, blocks, after it. New KV is written at its end, when it would be
        complete."""
        given = cast(U64Array | None, rows)
        begin_s = self._pace.begin(None if given is None else _arrival_s(given))
        what = f"stage {self._stage}, step {plan.step}"
        held = self._pool.read(batch.context, what)
        hashes = continue_with(batch.columns, held.hashes)
        if given is not None and not np.array_equal(given[:, 0], hashes):
            raise InvariantError(f"{what}: the rows from the stage before follow another context")
        end_s = self._pace.end(begin_s + batch.compute_s)
        self._pool.check_unchanged(batch.context, held, what)
        self._pool.write(batch.columns, hashes)
        if not self._is_last:
            out = np.empty((len(hashes), ROW_NUMBERS), np.uint64)
            out[:, 0] = hashes
            out[:, 1] = int((end_s + batch.hop_s) * _NS)
            return StepResult(rows=out, compute_s=batch.compute_s)
        columns = batch.columns
        sampled = hashes[columns.sample_rows]
        tokens = made_up_tokens(sampled, plan.sample, self._vocab_size)
        return StepResult(tokens=tokens, compute_s=batch.compute_s)


def _arrival_s(rows: U64Array) -> float:
    return int(rows[0, 1]) / _NS
