"""Jobs as a table for a terminal."""

from collections.abc import Iterable
from typing import Any

import msgspec
from rich.table import Table

from pipemax.client import JobInfo


def job_table(jobs: Iterable[JobInfo], now: float) -> Table:
    """`now` is Unix time."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("job", overflow="fold")
    table.add_column("state")
    for heading in ("requests", "done", "failed", "tokens in", "tokens out", "age"):
        table.add_column(heading, justify="right", overflow="fold")
    for job in jobs:
        share = f" ({job.num_results / job.num_requests:.0%})" if job.num_requests else ""
        table.add_row(
            job.name,
            job.state,
            str(job.num_requests),
            f"{job.num_results}{share}",
            str(job.num_failed),
            str(job.prompt_tokens),
            str(job.output_tokens),
            age(now - job.created_at),
        )
    return table


def as_json(job: JobInfo) -> dict[str, Any]:
    """For programs. Without what the client that made it left for itself."""
    fields: dict[str, Any] = msgspec.to_builtins(job)
    del fields["about"]
    return fields


def age(seconds: float) -> str:
    """In the largest unit that there is one of."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
