"""Panels of a Grafana dashboard, in the few forms that PipeMax' dashboards need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
"""Grafana's columns."""


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str
    """Grafana's format: `{{label}}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    about: str
    """What it shows and what to look for, for people."""
    queries: tuple[Query, ...]
    unit: str
    """Grafana's name of it: `percentunit`, `Bps`, `s`, `short`."""
    kind: str = "timeseries"
    width: int = 12
    height: int = 8
    stacked: bool = False
    most: float | None = None
    colours: Mapping[str, str] = field(default_factory=dict)
    """By legend."""
    repeat: str | None = None
    """Once for each value of this variable."""


def dashboard(uid: str, title: str, about: str, rows: Sequence[tuple[str, Sequence[Panel]]]) -> Any:
    """The dashboard as Grafana's JSON: `rows` of (heading, panels), from top to bottom."""
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["pipemax"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "tags": ["pipemax"],
                "title": "PipeMax",
                "asDropdown": False,
                "keepTime": True,
                "includeVars": True,
            }
        ],
        "templating": {"list": _variables()},
        "panels": _laid_out(rows),
    }


def _variables() -> list[Any]:
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {"text": "Prometheus", "value": "pipemax-prometheus"},
        },
        _label_values("instance", "System", "label_values(pipemax_epoch, instance)", several=False),
        _label_values(
            "stage",
            "Stages",
            'label_values(pipemax_stage_steps_total{instance="$instance"}, stage)',
            several=True,
        ),
    ]


def _label_values(name: str, label: str, query: str, *, several: bool) -> Any:
    variable: dict[str, Any] = {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATA_SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 3,
        "multi": several,
        "includeAll": several,
    }
    if several:
        variable["current"] = {"text": ["All"], "value": ["$__all"]}
    return variable


def _laid_out(rows: Sequence[tuple[str, Sequence[Panel]]]) -> list[Any]:
    laid: list[Any] = []
    top = 0
    for heading, panels in rows:
        place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        row = {"type": "row", "title": heading, "collapsed": False, "panels": [], "gridPos": place}
        laid.append({"id": len(laid) + 1, **row})
        top += 1
        left = tallest = 0
        for panel in panels:
            if left + panel.width > WIDTH:
                left, top, tallest = 0, top + tallest, 0
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            laid.append({"id": len(laid) + 1, **_panel(panel), "gridPos": place})
            left, tallest = left + panel.width, max(tallest, panel.height)
        top += tallest
    return laid


def _panel(panel: Panel) -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATA_SOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATA_SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
            }
            for index, query in enumerate(panel.queries)
        ],
        "fieldConfig": {
            "defaults": _defaults(panel),
            "overrides": [
                {
                    "matcher": {"id": "byName", "options": legend},
                    "properties": [
                        {"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}
                    ],
                }
                for legend, colour in panel.colours.items()
            ],
        },
        "options": _options(panel.kind),
    }
    if panel.repeat is not None:
        made |= {"repeat": panel.repeat, "repeatDirection": "h", "maxPerRow": 4}
    return made


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "lineWidth": 0 if panel.stacked else 2,
            "fillOpacity": 85 if panel.stacked else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    return defaults


def _options(kind: str) -> dict[str, Any]:
    if kind == "timeseries":
        return {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "none"},
        }
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "horizontal" if kind == "bargauge" else "auto",
    }
