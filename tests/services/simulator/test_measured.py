"""Files of measured costs."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipemax.proto.errors import ConfigError
from pipemax.services.cli import app
from pipemax.services.simulator import measured
from pipemax.services.simulator.measured import MeasuredSystem, load_measured
from pipemax.services.simulator.spec import SimulationSpec, measured_spec
from pipemax.services.simulator.workload import Workload, lognormal
from pipemax.services.simulator.world import simulate
from pipemax.stage_worker.modelled.roofline import StepLoad

STAGE: dict[str, Any] = {
    "num_layers": 6,
    "block_bytes": 1000,
    "fixed_s": 4e-3,
    "per_request_s": 1e-4,
    "per_context_token_s": 1e-6,
    "per_prompt_token_s": 5e-5,
    "per_prompt_pair_s": 1e-8,
    "load_bytes_s": 2e6,
    "store_bytes_s": 1e6,
}
SYSTEM: dict[str, Any] = {
    "format": "pipemax-measured-1",
    "description": "made up for a test",
    "model": "small",
    "block_size": 16,
    "num_device_blocks": 40,
    "num_host_blocks": 100,
    "stages": [STAGE, STAGE],
}


def write(path: Path, changes: dict[str, Any]) -> Path:
    file = path / "measured.json"
    file.write_text(json.dumps(SYSTEM | changes))
    return file


def read(path: Path, changes: dict[str, Any]) -> MeasuredSystem:
    return load_measured(write(path, changes))


def test_a_step_costs_what_the_formula_says(tmp_path: Path) -> None:
    factors = [[1, 1.0], [101, 2.0], [102, 4.0]]
    [stage, _] = read(tmp_path, {"stages": [STAGE | {"rows_factors": factors}, STAGE]}).stages
    load = StepLoad(11, 500, 40, 900)
    assert stage.step_s(load) == pytest.approx(
        1.5 * (4e-3 + 11 * 1e-4 + 40 * 5e-5) + 500e-6 + 900e-8
    )
    rows = (0, 1, 26, 101, 102, 1000)
    assert [stage.factor(row) for row in rows] == pytest.approx([1, 1, 1.25, 2, 4, 4])


def test_every_field_is_described() -> None:
    for kind in (measured.MeasuredSystem, measured.MeasuredStage):
        for name in kind.__struct_fields__:
            assert f'"{name}":' in str(measured.__doc__)


def test_links_are_each_stages_own_unless_grouped(tmp_path: Path) -> None:
    assert read(tmp_path, {}).group_of == (0, 1)
    assert read(tmp_path, {"link_groups": [[1, 0]]}).group_of == (0, 0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "2"}, "format"),
        ({"speed": 1}, "speed"),
        ({"stages": []}, "stages"),
        ({"stages": [STAGE | {"fixed_s": -1}]}, "fixed_s"),
        ({"stages": [STAGE | {"fixed_s": 0, "per_request_s": 0}]}, "take no time"),
        ({"stages": [STAGE | {"rows_factors": [[2, 1], [2, 1]]}]}, "must climb"),
        ({"stages": [STAGE | {"store_bytes_s": None}]}, "stage 0 needs load_bytes_s"),
        ({"link_groups": [[0], [0]]}, "each of the stages"),
        ({"compute_slowdown": [1.0]}, "needs 2 factors"),
        ({"compute_slowdown": [2.0, 1.0]}, "none below the one before"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=r"measured\.json") as found:
        read(tmp_path, changes)
    assert text in str(found.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_measured(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="holds no measured system"):
        load_measured(broken)


def decode_spec(path: Path, workload: Workload, **changes: Any) -> SimulationSpec:
    """A measured system in which nothing but steps takes time."""
    quiet = {"message_s": 0, "plan_s": 0, "hop_s": 0, "copy_s": 0}
    return measured_spec(read(path, quiet | changes), workload)


def test_a_simulated_step_takes_what_was_measured(tmp_path: Path) -> None:
    """One request: every token costs each stage δ + α + β·L, its overhead, and a hop."""
    stage = STAGE | {"overhead_s": 1e-3}
    workload = lognormal("one", 1, 20, 1, seed=0, sigma=0)
    spec = decode_spec(tmp_path, workload, stages=[stage, stage], hop_row_s=1e-3)
    result = simulate(spec)
    steps_s = sum(4e-3 + 1e-4 + 1e-6 * (1 + n) for n in range(20))
    overheads_s, hops_s = 20 * 1e-3, 20 * 1e-3
    expected_s = 2 * (steps_s + overheads_s) + hops_s
    assert result.working_s == pytest.approx(expected_s, rel=1e-6)
    for figures in result.stages:
        assert figures.state_s["compute"] == pytest.approx(steps_s)
    # The run ends with the last token, which the last stage sends in that moment.
    assert result.stages[0].state_s["send"] == pytest.approx(overheads_s)


def test_shared_cores_cost_what_they_were_measured_to(tmp_path: Path) -> None:
    workload = lognormal("two", 16, 200, 2, seed=0, sigma=0)
    alone = simulate(decode_spec(tmp_path, workload)).working_s
    shared = simulate(decode_spec(tmp_path, workload, compute_slowdown=[1.0, 2.0])).working_s
    assert shared == pytest.approx(2 * alone, rel=0.02)  # one request each: both always compute


def test_offloading_uses_the_measured_links(tmp_path: Path) -> None:
    workload = lognormal("many", 100, 40, 30, seed=0, sigma=0.3)
    plain = simulate(decode_spec(tmp_path, workload))
    assert plain.finished == 30
    for figures in plain.stages:
        moved = figures.load_bytes / figures.load_busy_s
        assert moved == pytest.approx(2e6, rel=1e-6)
        assert figures.store_bytes / figures.store_busy_s == pytest.approx(1e6, rel=1e-6)
    slow = STAGE | {"load_bytes_s": 2e4, "store_bytes_s": 1e4}
    slower = simulate(
        decode_spec(tmp_path, workload, stages=[slow, slow], link_groups=[[0, 1]], duplex=False)
    )
    assert slower.working_s > 1.05 * plain.working_s


def test_the_command_reads_it_and_refuses_what_it_says_already(tmp_path: Path) -> None:
    path = write(tmp_path, {"num_device_blocks": 60})
    arguments = ["simulate", "--measured", str(path), "--workload", "100,20", "--requests", "10"]

    def run(*more: str) -> str:
        done = CliRunner().invoke(app, [*arguments, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return str(done.stdout)

    text = run("--compare")
    assert "small on 2 × measured stages" in text
    with_it, off = json.loads(run("--json", "--compare"))
    assert with_it["num_host_blocks"] == 100
    assert off["num_host_blocks"] == 0
    assert with_it["num_device_blocks"] == 60
    assert json.loads(run("--json", "--kv-offloading-size", "0"))[0]["num_host_blocks"] == 0
    with pytest.raises(ConfigError, match="--gpu does not go with --measured"):
        run("--gpu", "l20")
    with pytest.raises(ConfigError, match="only 0 does"):
        run("--kv-offloading-size", "1GB")
    with pytest.raises(ConfigError, match="leave out --measured"):
        run("--against", "vllm-pp")
