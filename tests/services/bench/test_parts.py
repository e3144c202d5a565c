"""The parts alone: what is counted, what is refused, and what is printed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipemax.proto.errors import ConfigError
from pipemax.services.bench import parts_child, parts_command
from pipemax.services.bench.attention import decode_batch, in_place, per_request
from pipemax.services.bench.parts_command import Part, Shape
from pipemax.services.bench.planner import PlannerBench, PlannerLoad
from pipemax.services.bench.sampling_kinds import KINDS
from pipemax.services.bench.transfers import measure_copies

SMALL = PlannerLoad(
    requests=6, waiting=5, stages=2, device_blocks=9000, host_blocks=0, max_num_seqs=4
)


def test_a_part_says_its_share_of_the_limit() -> None:
    part = Part("reading", 2e9, "GB/s", 1e9, 8e9, "the machine")
    assert str(part) == "reading: 2.00 GB/s, 25% of the 8.00 GB/s of the machine"
    assert part.data["share_of_limit"] == 0.25
    assert str(Part("x", 3.0, "tokens/s", 1)) == "x: 3.00 tokens/s"


def test_decode_counts_the_kv_of_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_child, "_POOL_BYTES", 2**18)
    task: dict[str, Any] = {"kind": "decode", "batch": 3, "shortest": 10, "longest": 30}
    shape = {"dtype": "bfloat16", "heads": 4, "kv_heads": 2, "head_dim": 64, "seconds": 0.0}
    found = parts_child.decode(task | shape)
    assert found["bytes"] == (10 + 20 + 30) * 2 * 2 * 64 * 2  # keys and values, heads, dims, bytes
    assert found["seconds"] > 0


@pytest.mark.parametrize("layer", [0, 2])
def test_the_kernel_reads_the_layer_it_is_told(layer: int) -> None:
    batch, tables, num_blocks = decode_batch([5, 40])
    pool = torch.randn(num_blocks, 3, 2, 16, 2, 64)
    query = torch.randn(2, 4, 64)
    moved = pool[:, [0, layer, 0]]  # the plain way reads the second layer
    expected = per_request(moved, tables, torch.tensor([5, 40]), query)
    torch.testing.assert_close(in_place(pool, batch, query, layer), expected, atol=1e-4, rtol=1e-4)


def test_prompt_attention_counts_pairs() -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 32}
    task = {"tokens": 20, **shape, "dtype": "float32", "seconds": 0.0}
    assert parts_child.prompt(task)["flop"] == 4 * 4 * 32 * (20 * 21 / 2)


def test_huge_pages_are_counted_of_the_mapping_that_is_asked_for(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(
        "1000-2000 rw-s 00000000 00:01 7 /memfd:other (deleted)\n"
        "ShmemPmdMapped:     2048 kB\n"
        "2000-3000 rw-s 00000000 00:01 8 /memfd:bench-pool (deleted)\n"
        "Size:               9999 kB\n"
        "ShmemPmdMapped:     4096 kB\n"
        "VmFlags: rd wr sh\n"
    )
    assert parts_child.mapped_hugely(0x2FFF, smaps) == 4096 * 1024
    assert parts_child.mapped_hugely(0x1000, smaps) == 2048 * 1024
    assert parts_child.mapped_hugely(0x3000, smaps) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sampling_runs_step_after_step(kind: str) -> None:
    task = {"rows": 3, "vocab": 100, "sampling": KINDS[kind], "seconds": 0.001}
    assert parts_child.sampler(task)["bytes"] == 4 * 3 * 100


def test_rates_are_the_best_of_attempts_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class FakeChild:
        def __init__(self, *_: object) -> None:
            pass

        def ask(self, task: dict[str, Any]) -> object:
            asked.append(task["kind"])
            count = asked.count(task["kind"])
            if task["kind"] == "read":
                return 1e9 * min(count, 4)
            return {"seconds": 1.0, "bytes": 4e8 * (5 if count == 2 else 1)}

        def close(self) -> None:
            pass

    monkeypatch.setattr(parts_command, "Child", FakeChild)
    lines, data = parts_command.sampler(8, [1000], ["greedy"])
    assert asked == ["read", "sampler"] * 5
    assert lines == [
        "greedy, vocabulary 1000: 500000.00 tokens/s, 50% of the 1000000.00 tokens/s of reading "
        "each token's logits once"
    ]
    assert data["parts"][0]["share_of_limit"] == 0.5
    assert data["versions"]["pipemax"]


def test_copies_have_a_rate_for_each_direction_and_layout() -> None:
    found = measure_copies(4096, 16, attempts=1)
    assert set(found.by_way) == {
        "load, together",
        "load, scattered",
        "store, together",
        "store, scattered",
    }
    assert min(found.large_bytes_s, *found.by_way.values()) > 0


def test_planning_is_measured_with_as_many_waiting_as_asked() -> None:
    lines, data = parts_command.coordinator(SMALL, steps=12)
    assert data["running"] >= 6
    assert data["waiting"] == 5
    assert data["events"]["StepReturned"]["per_step"] == 1
    assert data["events"]["StageComputed"]["per_step"] == 2
    assert 0 < data["step"]["median_s"] <= data["step"]["p99_s"]
    assert lines[-1].startswith(f"a step, {data['running']} running and 5 waiting, 2 stages: ")


def test_a_step_takes_what_its_events_take() -> None:
    bench = PlannerBench(SMALL)
    bench.warm_up()
    for _ in range(5):
        bench.turn()
    assert len(bench.step_s) == 5
    of_events = sum(
        sum(seconds)
        for kind, seconds in bench.seconds.items()
        if not kind.startswith("encode") and kind != "Submitted"
    )
    assert sum(bench.step_s) == pytest.approx(of_events)


def test_more_than_can_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipemax.services.bench.planner._WARM_UP_STEPS", 3)
    load = PlannerLoad(requests=5000, stages=2, device_blocks=9000, host_blocks=0, max_num_seqs=2)
    with pytest.raises(ConfigError, match=r"only \d+ of --requests 5000 run at once"):
        parts_command.coordinator(load, steps=1)


def test_flags_are_checked() -> None:
    with pytest.raises(ConfigError, match="contexts from 9 to 8 makes no sense"):
        parts_command.kernels(["float32"], [Shape(4, 2, 64)], 1, 9, 8)
    with pytest.raises(ConfigError, match="--shape 5/2/64: 5 is not a multiple of 2"):
        Shape.of("5/2/64")
    for text in ("4/2", "4/0/64", "4/2/x", "4/2/64/1"):
        with pytest.raises(ConfigError, match="is not of the form HEADS/KV_HEADS/HEAD_SIZE"):
            Shape.of(text)
    with pytest.raises(ConfigError, match="--kind beam is not one of greedy"):
        parts_command.sampler(1, [64], ["beam"])
    with pytest.raises(ConfigError, match="give fewer or smaller blocks"):
        parts_command.transfers(2**40, 1)
