"""The metrics reference is what the code exports."""

import json
import re

from pipemax.coordinator import metrics_document
from support.source_tree import ROOT

ROWS = re.findall(r"^\| `(\w+)` \| (\w+) \|", metrics_document.render(), re.MULTILINE)


def test_the_reference_is_generated() -> None:
    written = (ROOT / "coordinator/METRICS.md").read_text()
    assert written == metrics_document.render(), (
        "run `python -m pipemax.coordinator.metrics_document > coordinator/METRICS.md`"
    )


def test_every_metric_is_there_and_its_labels_are_known() -> None:
    names = [name for name, _ in ROWS]
    assert len(set(names)) == len(names)
    assert {"pipemax_stage_seconds_total", "pipemax_job_eta_seconds"} <= set(names)
    for line in metrics_document.render().splitlines():
        if line.startswith("| `"):
            assert line.count("|") == 5, line
            assert not line.endswith("| |"), line


def test_what_rules_and_dashboards_ask_for_is_exported() -> None:
    """Also where no Prometheus is at hand to ask."""
    exported = {name for name, _ in ROWS}
    for name, kind in ROWS:
        if kind == "histogram":
            exported |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    files = [*(ROOT / "ops/prometheus").glob("pipemax.*.yaml")]
    texts = {path.name: path.read_text() for path in files}
    for path in (ROOT / "ops/grafana/dashboards").glob("*.json"):
        panels = json.loads(path.read_text())["panels"]
        texts[path.name] = "\n".join(
            query["expr"] for panel in panels for query in panel.get("targets", ())
        )
    for where, text in texts.items():
        asked = set(re.findall(r"(?<![\w:])pipemax_\w+(?![\w:])", text))
        assert asked <= exported, (where, asked - exported)
