"""Modelled steps over real blocks: right ones give the reference's tokens, wrong ones an error."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pipemax.proto.errors import InvariantError, WireError
from pipemax.proto.geometry import blocks_for
from pipemax.proto.memory import SharedMemory
from pipemax.proto.messages.control import StepPlan
from pipemax.proto.messages.types import pack_i32
from pipemax.proto.modelled import KV_TOKEN_BYTES
from pipemax.stage_worker.engine import WrongKvError
from pipemax.stage_worker.executor import StepResult
from pipemax.stage_worker.modelled.catalogue import load_catalogue
from pipemax.stage_worker.modelled.kv import ModelledPool
from pipemax.stage_worker.modelled.loads import load_of
from pipemax.stage_worker.modelled.marks import continuation
from pipemax.stage_worker.modelled.pace import Pace
from pipemax.stage_worker.modelled.roofline import StageModel
from pipemax.stage_worker.modelled.step import ModelledStep
from pipemax.stage_worker.state_clock import StateClock
from support.step_plans import greedy_row

BLOCK_SIZE = 4
NUM_BLOCKS = 32
VOCAB_SIZE = 1000
TIME_SCALE = 1e-3
PROMPTS = [list(range(100, 110)), [7], list(range(3, 16))]
TABLES = [[4, 5, 9, 1, 2], [30, 0], [8, 10, 3, 31, 20, 21]]
"""Device blocks of each request, in no order."""


class Time:
    """Moves only when a stage sleeps, which the test may look into."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.while_running: Callable[[], object] = lambda: None
        """Called in the middle of every step."""

    def sleep(self, seconds: float) -> None:
        self.while_running()
        self.now_s += seconds


class Stage:
    """One of two stages."""

    def __init__(self, index: int, time: Time) -> None:
        catalogue = load_catalogue()
        layers = (40 * index, 40 * index + 40)
        self.model = StageModel(catalogue.gpu("l20"), catalogue.model("llama-2-70b"), 40)
        self.pool = ModelledPool(NUM_BLOCKS, BLOCK_SIZE, layers)
        size = NUM_BLOCKS * BLOCK_SIZE * KV_TOKEN_BYTES
        self.blocks = np.frombuffer(self.pool.memory.buffer, np.uint8)[:size].reshape(
            NUM_BLOCKS, -1
        )
        clock = StateClock(lambda: round(time.now_s * 1e9))
        self.step = ModelledStep(
            index,
            self.model,
            self.pool,
            Pace(clock, lambda: time.now_s, time.sleep),
            is_last=index == 1,
            vocab_size=VOCAB_SIZE,
            time_scale=TIME_SCALE,
        )

    def close(self) -> None:
        del self.blocks
        self.pool.close()


class Pipeline:
    """Runs plans through both stages, as the executor would."""

    def __init__(self) -> None:
        self.time = Time()
        self.stages = [Stage(index, self.time) for index in range(2)]
        self.tables = [list(table) for table in TABLES]
        self.tokens = [list(prompt) for prompt in PROMPTS]
        self.computed = [0] * len(PROMPTS)

    def plan(self, most: int) -> StepPlan:
        """Up to `most` new tokens of every request."""
        new = [t[c : c + most] for t, c in zip(self.tokens, self.computed, strict=True)]
        ends = [c + len(n) for c, n in zip(self.computed, new, strict=True)]
        tables = [
            table[: blocks_for(end, BLOCK_SIZE)]
            for table, end in zip(self.tables, ends, strict=True)
        ]
        whole = [i for i, end in enumerate(ends) if end == len(self.tokens[i])]
        return StepPlan(
            epoch=1,
            step=9,
            slot=0,
            wait_for_load=False,
            num_tokens=pack_i32(map(len, new)),
            context_lens=pack_i32(self.computed),
            block_counts=pack_i32(map(len, tables)),
            block_tables=pack_i32(block for table in tables for block in table),
            token_ids=pack_i32(token for part in new for token in part),
            sample=tuple(greedy_row(item) for item in whole),
        )

    def run(self, plan: StepPlan) -> StepResult:
        first, second = (stage.step for stage in self.stages)
        rows = first.compute(plan, first.prepare(plan), None).rows
        assert rows is not None
        second.await_rows(rows)
        return second.compute(plan, second.prepare(plan), rows)

    def advance(self, most: int = 6) -> None:
        plan = self.plan(most)
        sampled = self.run(plan).tokens
        assert sampled is not None
        for index in range(len(PROMPTS)):
            end = min(self.computed[index] + most, len(self.tokens[index]))
            self.computed[index] = end
        for row, token in zip(plan.sample, sampled, strict=True):
            self.tokens[row.item].append(token)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    pipeline = Pipeline()
    yield pipeline
    pipeline.close()


def test_tokens_are_those_of_the_reference(pipeline: Pipeline) -> None:
    for _ in range(6):
        pipeline.advance()
    for prompt, tokens in zip(PROMPTS, pipeline.tokens, strict=True):
        outputs = tokens[len(prompt) :]
        assert len(outputs) >= 4
        assert outputs == continuation(prompt, len(outputs), VOCAB_SIZE)


def test_a_step_takes_as_long_as_the_model_says(pipeline: Pipeline) -> None:
    plan = pipeline.plan(6)
    work = pipeline.stages[0].step
    model = pipeline.stages[0].model
    compute_s = TIME_SCALE * model.step_s(load_of(plan))
    hop_s = TIME_SCALE * model.hop_bytes(len(plan.token_ids) // 4) / model.gpu.link_bytes_s
    begin_s = pipeline.time.now_s
    result = work.compute(plan, work.prepare(plan), None)
    assert result.compute_s == compute_s
    assert pipeline.time.now_s == pytest.approx(begin_s + compute_s, abs=1e-9)
    assert result.rows is not None
    pipeline.stages[1].step.await_rows(result.rows)
    assert pipeline.time.now_s == pytest.approx(begin_s + compute_s + hop_s, abs=1e-7)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("swap", "device block 4, token 0 of 4 holds the KV of position 4, that of 0 must be"),
        ("empty", "device block 9, token 0 of 4 is empty, the KV of position 8 must be there"),
        ("of another request", "device block 5, token 0 of 4 holds position 4 of another context"),
        ("of other layers", "device block 4, token 0 of 4 holds position 0 of another context"),
        ("one token", "device block 3, token 2 of 4 holds position 10 of another context"),
    ],
)
def test_a_wrong_block_is_an_error(
    pipeline: Pipeline, stage: int, damage: str, message: str
) -> None:
    pipeline.advance()
    pipeline.advance()
    blocks, others = pipeline.stages[stage].blocks, pipeline.stages[1 - stage].blocks
    if damage == "swap":
        blocks[[4, 5]] = blocks[[5, 4]]
    elif damage == "empty":
        blocks[9] = 0
    elif damage == "of another request":
        blocks[5] = blocks[10]
    elif damage == "of other layers":
        blocks[4] = others[4]
    else:
        blocks[3, 2 * KV_TOKEN_BYTES] ^= 1
    with pytest.raises(WrongKvError, match=f"^stage {stage}, step 9: {message}"):
        pipeline.advance()


def test_whole_kv_of_another_request_shows_in_the_rows_or_in_the_tokens(
    pipeline: Pipeline,
) -> None:
    """Within one stage it is a sequence like any other; beside the other stage's it is not."""
    pipeline.advance(20)
    tables = TABLES[0][:3], TABLES[2][:3]
    blocks = pipeline.stages[1].blocks
    blocks[tables[0]] = blocks[tables[1]]
    with pytest.raises(InvariantError, match="rows from the stage before follow another context"):
        pipeline.advance()


def test_a_block_that_changes_while_it_is_read_is_an_error(pipeline: Pipeline) -> None:
    pipeline.advance()
    pipeline.advance()

    def overwrite() -> None:
        blocks = pipeline.stages[0].blocks
        blocks[9] = blocks[4]

    pipeline.time.while_running = overwrite
    with pytest.raises(WrongKvError, match="device block 9 was overwritten while the step ran"):
        pipeline.advance()


def test_new_kv_is_there_only_when_the_step_ends(pipeline: Pipeline) -> None:
    seen: list[bool] = []
    pipeline.time.while_running = lambda: seen.append(bool(pipeline.stages[0].blocks[4].any()))
    pipeline.advance()
    assert seen[0] is False
    assert pipeline.stages[0].blocks[4].any()


def test_blocks_may_travel_through_another_mapping(pipeline: Pipeline) -> None:
    """As the daemon copies them: out, away, and to other device blocks."""
    pipeline.advance()
    pipeline.advance()
    for stage in pipeline.stages:
        memory = SharedMemory.open(stage.pool.memory.handle)
        copy = np.frombuffer(memory.buffer, np.uint8)[: stage.blocks.size].reshape(NUM_BLOCKS, -1)
        copy[[25, 26, 27]] = copy[[4, 5, 9]]
        copy[[4, 5, 9]] = 0
        del copy
        memory.close()
    pipeline.tables[0] = [25, 26, 27, 1, 2]
    pipeline.advance()
    pipeline.advance()
    outputs = pipeline.tokens[0][len(PROMPTS[0]) :]
    assert outputs == continuation(PROMPTS[0], len(outputs), VOCAB_SIZE)


def test_a_block_beyond_the_pool_is_refused(pipeline: Pipeline) -> None:
    pipeline.tables[1][0] = NUM_BLOCKS
    with pytest.raises(WireError, match=f"uses block {NUM_BLOCKS}; this pool has {NUM_BLOCKS}"):
        pipeline.stages[0].step.prepare(pipeline.plan(6))
