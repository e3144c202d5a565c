"""A real Prometheus scrapes a running system, and every expression that the dashboards and the
alerts use gives series: a name or a label that is misspelled anywhere gives none."""

import json
import re
from pathlib import Path

import yaml

from support.monitored_system import busy_system, http_target
from support.prometheus import OPS, Prometheus, without_thresholds

Expressions = dict[str, str]


def of_dashboards(target: str) -> Expressions:
    variables = {"instance": target, "stage": "1", "__rate_interval": "30s"}
    return {
        f"{path.stem}: {panel['title']}: {query['legendFormat']}": re.sub(
            r"\$(\w+)", lambda match: variables[match.group(1)], query["expr"]
        )
        for path in (OPS / "grafana/dashboards").glob("*.json")
        for panel in json.loads(path.read_text())["panels"]
        for query in panel.get("targets", ())
    }


def of_alerts() -> Expressions:
    return {
        rule["alert"]: without_thresholds(rule["expr"])
        for group in yaml.safe_load((OPS / "prometheus/pipemax.alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    }


def of_variables(target: str) -> Expressions:
    """What dashboards offer to choose from: series whose labels Grafana lists."""
    found = {}
    for path in (OPS / "grafana/dashboards").glob("*.json"):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                query = variable["query"]["query"].replace("$instance", target)
                selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()  # type: ignore[union-attr]
                found[f"{path.stem}: ${variable['name']}"] = f"count by ({label}) ({selector})"
    return found


def test_every_expression_gives_series(tmp_path: Path) -> None:
    with busy_system() as system, Prometheus(tmp_path, http_target(system)) as prometheus:
        asked = of_dashboards(prometheus.target) | of_alerts() | of_variables(prometheus.target)
        prometheus.wait_for("pipemax_job_eta_seconds")
        prometheus.wait_for("instance:pipemax_bubble:share1m")
        without = {name: expr for name, expr in asked.items() if not prometheus.wait_for_some(expr)}
        assert without == {}
        shares = prometheus.series(
            "sum by (stage) (instance_stage_state:pipemax_stage_seconds:share1m)"
        )
    assert [round(float(share["value"][1]), 6) for share in shares] == [1.0, 1.0]
