"""What the GPU picks, and what the host draws from what the GPU sends."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch

from pipemax.proto.messages.control import NO_TOKEN, SampleRow, StepPlan
from pipemax.stage_worker.attention.device.batch import DeviceStep, view_batch
from pipemax.stage_worker.attention.device.layout import BatchLayout
from pipemax.stage_worker.channels.logits import LogitsShape
from pipemax.stage_worker.devices.cuda import inputs as cuda_inputs
from pipemax.stage_worker.devices.cuda.buffers import Gpu
from pipemax.stage_worker.devices.cuda.inputs import InputVersion, SampleInputs, inputs_bytes
from pipemax.stage_worker.devices.cuda.token_exit import PendingTokens, TokenExit
from pipemax.stage_worker.plan_columns import read_columns
from pipemax.stage_worker.sampling import sample
from pipemax.stage_worker.sampling.worker import LogitsRing
from support.cuda_stage import simulated
from support.fake_cuda.torch_side import open_torch
from support.step_plans import decode_plan

VOCAB, ROWS, SLOTS = 97, 6, 3
RING = LogitsShape(SLOTS, ROWS, VOCAB)


@dataclass
class Stage:
    """The end of the last stage, fed with logits of the test."""

    gpu: Gpu
    way_out: TokenExit
    version: InputVersion

    def __post_init__(self) -> None:
        self.compute = self.gpu.runtime.create_stream()

    num_samplers: int = 0

    def send(self, plan: StepPlan, logits: torch.Tensor) -> PendingTokens:
        columns = read_columns(plan, 16)
        layout = BatchLayout.of_step(columns, 16)
        step = DeviceStep(view_batch(self.version.device.bytes, layout), columns)
        packed = self.version.pack(
            step, 16, plan.sample, VOCAB, self.compute, num_samplers=self.num_samplers
        )
        assert packed.sample is not None
        made = [logits.clone()]
        return self.way_out.take(packed.sample, len(plan.sample), made.pop, self.compute, plan.slot)

    def close(self) -> None:
        for stream in (self.compute, self.way_out.stream):
            self.gpu.runtime.synchronize(stream)
        self.way_out.free()
        self.version.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with simulated(tmp_path / "gpu", delay_s=0.001) as process:
        runtime = process.open_runtime(0)
        gpu = Gpu(runtime, open_torch(runtime))
        way_out = TokenExit(gpu, max_rows=ROWS, vocab_size=VOCAB, steps=2)
        largest = BatchLayout.of_decodes(ROWS, ROWS)
        stage = Stage(gpu, way_out, InputVersion(gpu, inputs_bytes(largest)))
        yield stage
        stage.close()
        process.close()


def plan_of(*rows: SampleRow) -> StepPlan:
    return msgspec.structs.replace(decode_plan(0, rows=len(rows)), sample=rows)


def row(item: int, temperature: float = 0.0, banned: tuple[int, ...] = ()) -> SampleRow:
    return SampleRow(item, 77 + item, 3, temperature, 0, 1.0, 0.0, banned)


def some_logits(seed: int, rows: int = ROWS) -> torch.Tensor:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[0, 40] = logits[0, 41] = 9.0  # the smaller token id wins
    logits[-1, 7] = float("inf")
    return logits


def everything_arrived(stage: Stage) -> None:
    stage.gpu.runtime.synchronize(stage.way_out.stream)


@pytest.mark.parametrize("most_bans", [4096, 3])
def test_tokens_are_those_of_the_hosts_sampler(
    stage: Stage, most_bans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, drawn, with and without bans; also with more bans than the device takes."""
    monkeypatch.setattr(cuda_inputs, "MAX_BANS", most_bans)
    logits = some_logits(1)
    rows = (
        row(0, banned=(40, 3)),
        row(1, 0.7, banned=(2, 5)),
        row(2, banned=(int(logits[2].argmax()), VOCAB + 5)),
        row(3),
        row(4, 1.3),
        row(5),
    )
    plan = plan_of(*rows)
    pending = stage.send(plan, logits)
    everything_arrived(stage)
    inside = [msgspec.structs.replace(rows[2], banned_token_ids=rows[2].banned_token_ids[:1])]
    expected = sample(logits, [*rows[:2], *inside, *rows[3:]])
    plan = plan_of(*rows[:2], *inside, *rows[3:])
    assert stage.way_out.tokens(pending, plan).tokens == expected
    assert expected[0] == 41
    assert expected[5] == 7


def test_logits_stay_until_they_were_sent(stage: Stage) -> None:
    """The way to the host is held up while the next step's tokens are picked."""
    gate = threading.Event()
    stage.gpu.runtime.call(stage.way_out.stream, gate.wait)  # type: ignore[attr-defined]
    plan = plan_of(*(row(item, 0.9) for item in range(ROWS)))
    logits = [some_logits(seed) for seed in (1, 2)]
    pending = [stage.send(plan, each) for each in logits]
    inputs = SampleInputs(None, torch.zeros(1, dtype=torch.int64), (0,))
    assert not stage.way_out.ready(inputs), "a third has no place yet"
    time.sleep(0.1)  # for the second step to run ahead, if nothing stops it
    gate.set()
    everything_arrived(stage)
    found = [stage.way_out.tokens(each, plan).tokens for each in pending]
    assert found == [sample(each, plan.sample) for each in logits]
    assert stage.way_out.ready(inputs)


@pytest.fixture
def sampled_elsewhere(tmp_path: Path) -> Iterator[Stage]:
    with simulated(tmp_path / "gpu", delay_s=0.001) as process:
        runtime = process.open_runtime(0)
        gpu = Gpu(runtime, open_torch(runtime))
        way_out = TokenExit(
            gpu, max_rows=ROWS, vocab_size=VOCAB, steps=3, num_samplers=2, ring=RING
        )
        version = InputVersion(gpu, inputs_bytes(BatchLayout.of_decodes(ROWS, ROWS)))
        stage = Stage(gpu, way_out, version, num_samplers=2)
        yield stage
        stage.close()
        process.close()


def test_logits_for_samplers_arrive_in_the_entry_of_their_slot(sampled_elsewhere: Stage) -> None:
    """And the device still answers what is plain greedy."""
    stage = sampled_elsewhere
    rows = (row(0, 0.8), row(1), row(2, 0.5), row(3), row(4, 1.0), row(5))
    plans = [msgspec.structs.replace(plan_of(*rows), slot=slot) for slot in range(SLOTS)]
    logits = [some_logits(seed) for seed in range(SLOTS)]
    pending = [stage.send(plan, each) for plan, each in zip(plans, logits, strict=True)]
    inputs = SampleInputs(None, torch.zeros(1, dtype=torch.int64), (0,), ((0,), ()))
    assert stage.way_out.ready(inputs), "a slot that is planned has its entry free"
    everything_arrived(stage)
    assert stage.way_out.place is not None
    ring = LogitsRing(stage.way_out.place.handle, stage.way_out.place.shape)
    for slot, each in enumerate(pending):
        found = stage.way_out.tokens(each, plans[slot])
        assert found.shares == ((0, 4), (2,))
        greedy = logits[slot].argmax(dim=1).tolist()
        assert found.tokens == [NO_TOKEN, greedy[1], NO_TOKEN, greedy[3], NO_TOKEN, greedy[5]]
        assert torch.equal(ring.rows(slot, 0, 3), logits[slot][[0, 4, 2]])
    ring.close()
