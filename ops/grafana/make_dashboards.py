"""Writes the dashboards that Grafana is provisioned with.

    python ops/grafana/make_dashboards.py

A test asks a real Prometheus each expression. `$instance` and `$stage` are the dashboards'
variables.
"""

import json
from pathlib import Path
from typing import Any

from bubbles_panels import AT_A_GLANCE, BALANCE, BUBBLES, PREFETCH
from panels import dashboard
from work_panels import JOBS, LATENCY, RESIDENCY, SYSTEM, THROUGHPUT

TARGET = Path(__file__).parent / "dashboards"

DASHBOARDS: dict[str, Any] = {
    "pipemax-bubbles.json": dashboard(
        "pipemax-bubbles",
        "PipeMax: bubbles",
        "Why stages do not compute. How to read it: ops/bubbles.md.",
        (
            ("At a glance", AT_A_GLANCE),
            ("Bubbles", BUBBLES),
            ("Stage and slot balance", BALANCE),
            ("Prefetch and links", PREFETCH),
        ),
    ),
    "pipemax-work.json": dashboard(
        "pipemax-work",
        "PipeMax: work",
        "What the system gets done, where KV lives, when jobs are finished.",
        (
            ("Throughput and queue", THROUGHPUT),
            ("Jobs", JOBS),
            ("KV residency", RESIDENCY),
            ("Latency", LATENCY),
            ("System", SYSTEM),
        ),
    ),
}


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for name, made in DASHBOARDS.items():
        (TARGET / name).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
