"""Files of measured costs."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.services.simulator import measured
from pipemax.services.simulator.measured import MeasuredSystem, load_measured
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
