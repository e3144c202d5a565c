"""The files under ops/ that monitoring consists of, each checked by the tool that reads it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from bubbles_panels import STATE_COLOURS
from make_dashboards import DASHBOARDS as MADE

from pipemax.proto.states import STATES
from pipemax.services.simulator.gantt import COLOURS
from support.prometheus import OPS, binary, without_thresholds
from support.source_tree import ROOT

PROMETHEUS = OPS / "prometheus"
DASHBOARDS = sorted((OPS / "grafana/dashboards").glob("*.json"))


def run(*command: str, cwd: Path = PROMETHEUS) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    return [
        rule
        for path in PROMETHEUS.glob("pipemax.*s.yaml")
        for group in yaml.safe_load(path.read_text()).get("groups", ())
        for rule in group["rules"]
    ]


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    run(binary("promtool"), "check", "config", "prometheus.yaml")


def test_rules_do_what_they_say() -> None:
    run(binary("promtool"), "test", "rules", "pipemax.tests.yaml")


def test_every_rule_has_a_test() -> None:
    tests = (PROMETHEUS / "pipemax.tests.yaml").read_text()
    names = [rule.get("record") or rule["alert"] for rule in rules()]
    assert names
    assert [name for name in names if name not in tests] == []


def test_dashboards_are_generated() -> None:
    for name, made in MADE.items():
        written = json.loads((OPS / "grafana/dashboards" / name).read_text())
        assert written == json.loads(json.dumps(made)), "run ops/grafana/make_dashboards.py"
    assert {path.name for path in DASHBOARDS} == set(MADE)


def test_states_have_the_same_colours_everywhere() -> None:
    assert {state: COLOURS[state] for state in STATES} == STATE_COLOURS


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_neither_overlap_nor_leave_the_grid(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    made = json.loads(path.read_text())
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in made["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells


def test_what_is_provisioned_finds_its_parts() -> None:
    """Paths and names that one file gives and another one takes."""
    compose = yaml.safe_load((OPS / "compose.yaml").read_text())
    mounted = {}
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                assert (OPS / source).is_dir(), source
                mounted[target] = OPS / source
            else:
                assert source in compose["volumes"]
    provider = mounted["/etc/grafana/provisioning"] / "dashboards/pipemax.yaml"
    (dashboards,) = yaml.safe_load(provider.read_text())["providers"]
    assert mounted[dashboards["options"]["path"]] == OPS / "./grafana/dashboards"
    home = compose["services"]["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    assert Path(home).name in {path.name for path in DASHBOARDS}
    sources = mounted["/etc/grafana/provisioning"] / "datasources/prometheus.yaml"
    (source,) = yaml.safe_load(sources.read_text())["datasources"]
    flags = " ".join(compose["services"]["prometheus"]["command"])
    assert re.search(r"listen-address=127.0.0.1:(\d+)", flags)[1] == source["url"].split(":")[-1]  # type: ignore[index]
    assert (mounted["/etc/prometheus"] / "prometheus.yaml").is_file()
    for path in DASHBOARDS:
        variables = json.loads(path.read_text())["templating"]["list"]
        assert variables[0]["current"]["value"] == source["uid"]


@pytest.mark.parametrize("unit", sorted(path.name for path in (OPS / "systemd").iterdir()))
def test_systemd_accepts_the_units(unit: str, tmp_path: Path) -> None:
    """Commands that are not installed here are stood in for; all else is as it is."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian package `systemd`)")
    text = (OPS / "systemd" / unit).read_text()
    for command in re.findall(r"^Exec\w+=(\S+)", text, re.MULTILINE):
        stand_in = tmp_path / "bin" / Path(command).name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.symlink_to("/bin/true") if not stand_in.exists() else None
        text = text.replace(f"={command} ", f"={stand_in} ")
    for needed in re.findall(r"^Requires=(\S+)", text, re.MULTILINE):
        (tmp_path / needed).write_text("[Service]\nExecStart=/bin/true\n")
    path = tmp_path / unit.replace("@.", "@night.")
    path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:/lib/systemd/system", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in done.stderr, done.stderr


def test_units_ask_for_what_there_is() -> None:
    text = (OPS / "systemd/pipemax@.service").read_text()
    assert "bin/pipemax up --name %i" in text
    for path in re.findall(r"/opt/pipemax/(\S+\.(?:yaml|md))", "".join(
        unit.read_text() for unit in (OPS / "systemd").iterdir()
    )):  # fmt: skip
        assert (ROOT / path).is_file(), path


def test_thresholds_are_taken_out_of_alerts() -> None:
    assert without_thresholds('a{x="<1"} > 1 and b == 2') == 'a{x="<1"} > bool 1 and b == bool 2'
    assert without_thresholds('a{x!="y", z=~"b|c"} >= 0.5') == 'a{x!="y", z=~"b|c"} >= bool 0.5'
