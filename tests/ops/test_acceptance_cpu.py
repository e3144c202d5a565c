"""The scripts of the speed goals: who is compared with whom, on what terms, and what is kept of a
run that was cut off. The engines are fakes."""

import contextlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import acceptance_cpu
import contenders as module
import pytest
from acceptance_cpu import (
    COMPARISONS,
    LINES,
    OURS,
    QUARTER,
    VLLM,
    capped,
    compare,
    contenders_of,
    groups,
    verdict,
)
from contenders import Contender, Machine, Records, Series, our_options, peer_of
from line_chart import Line, draw, nice_step
from process_memory import Peak, allowed_bytes, judged

from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.services.bench.limit import Limit
from pipemax.services.bench.outcome import Side
from pipemax.services.bench.work import LognormalData, Work, lognormal_data
from pipemax.services.engine_config import build_config
from pipemax.services.tiny_model import ModelShape, make_demo_model


@pytest.fixture
def data() -> LognormalData:
    return lognormal_data(6, 20, 10, 0.5, vocab_size=1000, seed=1)


@pytest.fixture
def machine(data: LognormalData, tmp_path: Path) -> Machine:
    model = make_demo_model(tmp_path / "model", shape=ModelShape(num_layers=3))
    return Machine(model=model, data=data, in_flight=5)


def test_every_line_has_its_contenders_once_and_pairs_side_by_side() -> None:
    assert {one.line for one in COMPARISONS} < set(LINES)
    names = [one.name for one in contenders_of(COMPARISONS)]
    assert len(names) == len(set(names))
    wanted = [one for one in COMPARISONS if one.line == "capped"]
    assert [one.name for one in contenders_of(wanted)] == [
        "ours, 12320 tokens",
        "vllm, 12320 tokens",
        "ours, 6080 tokens",
        "vllm, 6080 tokens",
    ]
    assert groups(["memory", "offload", "ample"]) == [("ample", "offload"), ("memory",)]


def test_both_sides_are_capped_to_the_same_tokens(machine: Machine) -> None:
    ours, vllm = capped(OURS, 6080), capped(VLLM, 6080)
    config = build_config(our_options(ours, machine), "x")
    assert max(config.layer_split) == 2
    block_bytes = 2 * 2 * 16 * 1 * 64 * 4
    info_bytes = config.pool_bytes / (6080 // 16)
    assert info_bytes % block_bytes == 0  # of the stage with most layers
    assert config.kv_offloading_bytes > 0
    assert vllm.arguments == ("num_gpu_blocks_override=190", "block_size=32")
    assert 190 * 32 == 6080
    flags, setting = peer_of(vllm, machine)
    assert flags.arguments == vllm.arguments
    common = replace(machine, peer_arguments={"vllm": ["block_size=128"]})
    assert peer_of(vllm, common)[0].arguments == ("block_size=128", *vllm.arguments)
    assert setting.longest_tokens == config.max_model_len == machine.longest_tokens


def test_terms_are_equal_whatever_the_stages(machine: Machine) -> None:
    two = our_options(OURS, machine)
    one = our_options(Contender(name="one", stages=1), machine)
    assert (one.max_num_seqs, two.max_num_seqs) == (5, 3)
    assert one.kv_offloading_size == two.kv_offloading_size == "0"
    assert machine.tokens_of(OURS) > machine.all_tokens
    assert machine.tokens_of(QUARTER) == machine.all_tokens // 4
    with pytest.raises(ConfigError, match="speed is no field of EngineOptions"):
        our_options(OURS, Machine(model=machine.model, data=machine.data, in_flight=1,
                                  ours={"speed": 1}))  # fmt: skip


class FakeEngine:
    start_up_s = 1.0
    about: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __init__(self, name: str, log: list[tuple[str, Work]], fails_at: int | None) -> None:
        self.name = name
        self._log = log
        self._fails_at = fails_at

    def run(self, work: Work) -> float:
        self._log.append((self.name, work))
        if len(self._log) == self._fails_at:
            raise PipemaxSystemError("out of memory")
        return 1.0 + len(self._log)

    def cpu_seconds(self) -> float:
        return 0.0


@pytest.fixture
def log() -> list[tuple[str, Work]]:
    return []


@pytest.fixture
def fails_at(monkeypatch: pytest.MonkeyPatch, log: list[tuple[str, Work]]) -> dict[str, int]:
    """By engine: the call, of all, at which it fails; none as it is given."""
    plan: dict[str, int] = {}

    @contextlib.contextmanager
    def started(one: Contender, machine: Machine) -> Iterator[FakeEngine]:
        yield FakeEngine(one.name, log, plan.get(one.name))

    monkeypatch.setattr(module, "started", started)
    return plan


def series(machine: Machine, rounds: int, records: Records) -> Series:
    return Series([Contender(name="a"), Contender(name="b")], machine, rounds, records)


@pytest.mark.usefixtures("fails_at")
def test_rounds_alternate_with_prompts_of_their_own(
    machine: Machine, log: list[tuple[str, Work]]
) -> None:
    sides = series(machine, 3, Records(None, {})).run()
    timed = log[2:]
    assert [name for name, _ in timed] == ["a", "b", "b", "a", "a", "b"]
    assert [work for _, work in timed[::2]] == [machine.data.round(n) for n in range(3)]
    assert all(first == second for (_, first), (_, second) in zip(timed[::2], timed[1::2]))  # noqa: B905
    assert sides["a"].seconds == (4.0, 7.0, 8.0)


def test_a_run_that_was_cut_off_goes_on(
    machine: Machine, log: list[tuple[str, Work]], fails_at: dict[str, int], tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl"
    fails_at["b"] = 5
    cut = series(machine, 3, Records(path, {"requests": 6}))
    sides = cut.run()
    assert list(sides) == ["a"]
    assert cut.failed == {"b": "out of memory"}
    assert len(path.read_text().splitlines()) == 4
    log.clear()
    fails_at.clear()
    sides = series(machine, 3, Records(path, {"requests": 6})).run()
    assert [name for name, _ in log] == ["b", "b", "b"]  # its warm-up and what is left
    assert len(sides["b"].seconds) == 3
    log.clear()
    series(machine, 1, Records(path, {"requests": 7})).run()
    assert len(log) == 4


def test_goals_are_judged_by_the_median_of_rounds() -> None:
    limit = Limit(1, 1, 2.0, 0.0, 0.0, 1.0)
    sides = {"ours": Side("o", 1, (2.0, 4.0, 4.0)), "vllm": Side("v", 1, (3.0, 3.0, 8.0))}
    wanted = [one for one in COMPARISONS if one.line in ("ample", "stages")]
    against, share = compare(wanted, sides, limit)
    assert against["rounds"] == [1.5, 0.75, 2.0]
    assert (against["median"], against["met"]) == (1.5, True)
    assert (share["median"], share["met"]) == (0.5, False)
    assert verdict(share) == (
        "ample: ours / the limit: 0.500 (0.500 to 1.000, 3 rounds); goal 0.65, aim 0.85: MISSED"
    )
    assert compare(wanted, {"ours": sides["ours"]}, None) == []
    settings = [one for one in COMPARISONS if one.line == "vllm"]
    (more,) = compare(settings, {**sides, "vllm, 512 sequences": sides["ours"]}, None)
    assert verdict(more) == ("vllm: vllm, 512 sequences / vllm: 1.500 (0.750 to 2.000, 3 rounds)")


def test_memory_is_judged_by_what_a_process_may_hold(machine: Machine) -> None:
    config = build_config(our_options(OURS, machine), "x")
    allowed = allowed_bytes(config, machine)
    assert set(allowed) == {"coordinator", "kv-daemon", "stage-0", "stage-1"}
    stage = allowed["stage-0"]
    assert stage.total_bytes == stage.weights_bytes + stage.pool_bytes + 500_000_000
    assert config.pool_bytes - 2**20 < stage.pool_bytes <= config.pool_bytes
    peak = Peak(resident_bytes=300_000_000, private_bytes=100_000_000, ever_bytes=600_000_000)
    assert judged("ours", "kv-daemon", peak, allowed["kv-daemon"])["met"]
    assert not judged("ours", "stage-0", peak, allowed["stage-0"])["met"]
    assert judged("ours", "launcher", peak, None)["met"] is None


def test_a_chart_is_valid_and_has_what_it_is_given() -> None:
    lines = [
        Line("measured", [(1, 10.0), (8, 70.0)], spread=[(9.0, 11.0), (60.0, 80.0)]),
        Line("limit & more", [(1, 20.0), (8, 90.0)], dashed=True),
    ]
    for logarithmic in (False, True):
        text = draw("a < b", "x", "tokens/s", lines, logarithmic=logarithmic)
        root = ElementTree.fromstring(text)
        texts = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"a < b", "limit & more", "1", "8"} <= set(texts)
        assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 4
    assert [nice_step(most) for most in (4, 90, 100, 1000)] == [1, 20, 20, 200]


def test_values_are_read_as_numbers_where_they_are() -> None:
    assert acceptance_cpu.pair("max_num_batched_tokens=512") == ("max_num_batched_tokens", 512)
    assert acceptance_cpu.pair("policy=fcfs") == ("policy", "fcfs")
    assert json.dumps(acceptance_cpu.pair("enforce_eager=true")[1]) == "true"
