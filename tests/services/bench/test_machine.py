"""Measuring a machine: one real core for a moment, and how rates of cores become one."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.services.bench import machine as module
from pipemax.services.bench.children import Child, children
from pipemax.services.bench.limit import limit_of
from pipemax.services.bench.limit_command import cores_of, limit_lines, machine_lines
from pipemax.services.bench.machine import Machine, Rate, measure_machine, used_cores
from pipemax.services.bench.model import SHAPE_121M
from pipemax.services.bench.model_cost import cost_of, dtype_of
from pipemax.services.bench.outcome import Throughput
from pipemax.services.bench.work import BenchRequest
from pipemax.services.launcher.processes import stage_environment
from pipemax.services.tiny_model import ModelShape, make_demo_model
from pipemax.stage_worker.model.inspect import inspect_model


def test_a_real_core_multiplies_and_reads() -> None:
    said: list[str] = []
    (core,) = used_cores(1)
    found = measure_machine(
        [core], ["float32"], [(32, 16)], said.append, rows=(1, 4), read_bytes=2**20, seconds=0.001
    )
    assert found.cores == (core,)
    assert list(found.products_flop_s["float32"]) == [1, 4]
    assert found.rates("float32").read_bytes_s > 1e6
    assert found.rates("float32").large_flop_s > 1e3
    assert len(said) == 2


ANSWERS = """
import sys, json
core, count = int(sys.argv[1]), 0
for line in sys.stdin:
    task = json.loads(line)
    count += 1
    # Slower at every attempt but the second; core 1 has ten times the rate of core 0.
    print(10 ** core * (2 if count % 5 == 2 else 1), flush=True)
"""


def test_all_cores_work_at_once_and_the_fastest_attempt_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(core: int) -> Child:
        return Child("fake", [sys.executable, "-c", ANSWERS, str(core)])

    monkeypatch.setattr(module, "_start", start)
    found = measure_machine([0, 1], ["float32"], [(1, 1)], lambda line: None, rows=(1,))
    assert found.read_bytes_s == Rate(one_core=2.0, all_cores=22.0)
    assert found.rates("float32").product_flop_s == {1: 22.0}


def test_cores_are_measured_in_the_environment_of_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(module, "Child", lambda name, argv, given: environments.append(given))
    module._start(0)
    assert environments == [stage_environment(1, "cpu")]


def test_a_child_that_ends_is_an_error_with_its_last_line() -> None:
    code = "import sys; input(); sys.exit('no such dtype')"
    with (
        children(Child("core 3", [sys.executable, "-c", code])) as (child,),
        pytest.raises(PipemaxSystemError, match="core 3: no such dtype"),
    ):
        child.ask({"kind": "read"})
    with pytest.raises(PipemaxSystemError, match="/no/such: No such file"):
        Child("core 3", ["/no/such"])


def made_model(folder: Path, **changes: Any) -> Path:
    import json

    make_demo_model(folder, shape=ModelShape(num_layers=2))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WORK = (BenchRequest([1] * 100, 20),)


def test_a_token_costs_what_the_matrices_hold(tmp_path: Path) -> None:
    """Of the model that is made; 2 layers of it, so that it is quick."""
    folder = made_model(tmp_path)
    cost, matrices = cost_of(folder, inspect_model(folder), "bfloat16", WORK)
    hidden, inner, keys = 192, 512, 64
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    assert cost.layer_parameters == 2 * layer
    assert sum(rows * columns for rows, columns in matrices) == layer
    assert cost.head_parameters == 1024 * hidden
    assert cost.kv_token_bytes == 2 * 2 * keys * 2  # layers, keys and values, bytes
    assert cost.pair_flop == 4 * 2 * hidden
    assert cost.weights_bytes == 2 * (2 * layer + 1024 * hidden)
    tied = made_model(tmp_path / "tied", tie_word_embeddings=True)
    assert cost_of(tied, inspect_model(tied), "bfloat16", WORK)[0] == cost
    assert SHAPE_121M.head_dim == 64


def test_a_model_of_which_the_formula_knows_nothing_is_refused(tmp_path: Path) -> None:
    window = made_model(tmp_path / "window", sliding_window=64)
    with pytest.raises(ConfigError, match="sliding window of 64"):
        cost_of(window, inspect_model(window), "bfloat16", WORK)
    off = made_model(tmp_path / "off", sliding_window=64, use_sliding_window=False)
    cost_of(off, inspect_model(off), "bfloat16", WORK)
    experts = made_model(tmp_path / "experts", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ConfigError, match="mixture of experts"):
        cost_of(experts, inspect_model(experts), "bfloat16", WORK)


def test_flags_are_checked(tmp_path: Path) -> None:
    info = inspect_model(made_model(tmp_path))
    assert dtype_of("auto", info) == "float32"
    with pytest.raises(ConfigError, match="--dtype int8"):
        dtype_of("int8", info)
    with pytest.raises(ConfigError, match="--cores 4096: this process may use 1 to"):
        cores_of(4096)


def test_the_report_has_the_rates_and_the_parts(tmp_path: Path) -> None:
    folder = made_model(tmp_path)
    cost, _ = cost_of(folder, inspect_model(folder), "float32", WORK)
    rates = {1: Rate(1e12, 1.5e12), 512: Rate(2e12, 3e12)}
    machine = Machine((0, 1), {"float32": rates}, Rate(1e10, 1.5e10))
    assert machine_lines(machine) == [
        "Reading memory: 10.0 GB/s on one core, 15.0 GB/s on 2 together",
        "Matrix products, TFLOP/s:",
        "  dtype       rows  one core   2 cores",
        "  float32        1     1.000     1.500",
        "  float32      512     2.000     3.000",
    ]
    found = limit_of(WORK, cost, machine.rates("float32"))
    lines = limit_lines(found, Throughput.of(WORK), "float32", 2)
    assert lines[0].startswith("Limit of 2 cores in float32: ")
    assert f"{20 / found.seconds:.2f} output tokens/s" in lines[0]
    assert "19 decode steps, at most 1 requests" in lines[2]
