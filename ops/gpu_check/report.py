"""What is kept of a check: one JSON file, complete after each part, and a table for people."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_findings import encode, write_json

from gpu_check.runner import Outcome

FORMAT = "pipemax-gpu-check-1"
_TABLE_WIDTH = 160
"""Longer lines are cut in the table; the JSON has all of it."""


class Report:
    """Writes `path` anew with every part."""

    def __init__(self, path: Path, head: dict[str, Any], names: Sequence[str]) -> None:
        """`head`: machine, commit, date. `names`: of the parts that are to run."""
        self.outcomes: list[Outcome] = []
        self._path = path
        self._head = head
        self._names = tuple(names)
        self._write()

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._write()

    @property
    def passed(self) -> bool:
        """Every part ran, and none failed."""
        complete = len(self.outcomes) == len(self._names)
        return complete and all(outcome.status != "fail" for outcome in self.outcomes)

    def _write(self) -> None:
        ran = {outcome.name for outcome in self.outcomes}
        write_json(
            self._path,
            {
                "format": FORMAT,
                **self._head,
                "passed": self.passed,
                "not_run": [name for name in self._names if name not in ran],
                "parts": [_part(outcome) for outcome in self.outcomes],
            },
        )


def table(report: Report) -> str:
    """A line for each part, and one for each thing it found."""
    lines = ["", f"{'part':<12}{'result':<8}{'seconds':>8}"]
    for outcome in report.outcomes:
        lines.append(f"{outcome.name:<12}{outcome.status:<8}{outcome.seconds:>8.1f}")
        lines += [_cut(line) for line in _details(outcome)]
    counts = dict.fromkeys(("pass", "fail", "skip"), 0)
    for outcome in report.outcomes:
        counts[outcome.status] += 1
    seconds = sum(outcome.seconds for outcome in report.outcomes)
    lines += [
        "",
        f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped "
        f"in {seconds:.0f} s",
    ]
    return "\n".join(lines)


def _details(outcome: Outcome) -> Iterator[str]:
    found = outcome.findings
    for figure in found.figures:
        yield figure.text()
    for text in found.skips or ([outcome.reason] if outcome.status == "skip" else []):
        yield f"skipped: {text}"
    if outcome.status == "fail":
        yield f"FAILED: {outcome.reason}"
        yield from (f"FAILED: {text}" for text in found.failures[1:])


def _cut(line: str) -> str:
    return "    " + (line if len(line) <= _TABLE_WIDTH else line[: _TABLE_WIDTH - 1] + "…")


def _part(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "status": outcome.status,
        "reason": outcome.reason,
        "seconds": round(outcome.seconds, 2),
        **encode(outcome.findings),
        **({"output": outcome.output} if outcome.output else {}),
    }
