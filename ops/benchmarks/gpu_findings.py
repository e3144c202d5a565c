"""What a check found: figures, failures and what was left out, in a file that is complete after
every line, so that a check killed at its time limit keeps what it had. Imports nothing but Python.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value and, if it has one, its target."""

    name: str
    value: float | str
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; what is not finite meets none. None: there is no target."""
        if self.at_least is None and self.at_most is None:
            return None
        if isinstance(self.value, str) or not math.isfinite(self.value):
            return False
        over = self.at_least is None or self.value >= self.at_least
        return over and (self.at_most is None or self.value <= self.at_most)

    @property
    def target(self) -> str:
        parts = []
        if self.at_least is not None:
            parts.append(f">= {self.at_least:g}")
        if self.at_most is not None:
            parts.append(f"<= {self.at_most:g}")
        return " and ".join(parts)

    def text(self) -> str:
        """`decode share of copy bandwidth 0.74 (>= 0.7: met)`."""
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        line = f"{self.name} {value}{' ' * bool(self.unit)}{self.unit}"
        if self.met is not None:
            line += f" ({self.target}: {'met' if self.met else 'MISSED'})"
        return f"{line}; {self.note}" if self.note else line


@dataclass(slots=True)
class Findings:
    """Of one part. `done` says that the part came to its end."""

    figures: list[Figure] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    """What was left out, and why."""
    done: bool = False

    def problems(self) -> Iterator[str]:
        """One line for each reason why this did not pass."""
        yield from self.failures
        yield from (figure.text() for figure in self.figures if figure.met is False)


class FindingsWriter:
    """Keeps `path` up to date with what is found and prints each finding as it comes. Without a
    path it only prints."""

    def __init__(self, path: Path | None) -> None:
        self.findings = Findings()
        self._path = path
        self._write()

    def figure(
        self,
        name: str,
        value: float | str,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        note: str = "",
    ) -> Figure:
        figure = Figure(name, value, unit, at_least, at_most, note)
        self.findings.figures.append(figure)
        self._say(figure.text())
        return figure

    def fail(self, text: str) -> None:
        self.findings.failures.append(text)
        self._say(f"FAILED: {text}")

    def skip(self, text: str) -> None:
        self.findings.skips.append(text)
        self._say(f"skipped: {text}")

    def finish(self) -> bool:
        """The part came to its end; whether nothing is wrong."""
        self.findings.done = True
        self._write()
        return not list(self.findings.problems())

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, encode(self.findings))


def encode(findings: Findings) -> dict[str, Any]:
    """As JSON has it: `met` and `target` are told, and values that JSON has no number for are
    text."""
    return {
        "figures": [
            {
                **{
                    name: value for name, value in asdict(figure).items() if value not in (None, "")
                },
                "value": _plain(figure.value),
                **({} if figure.met is None else {"target": figure.target, "met": figure.met}),
            }
            for figure in findings.figures
        ],
        "failures": findings.failures,
        "skips": findings.skips,
        "done": findings.done,
    }


def decode(value: dict[str, Any]) -> Findings:
    known = {"name", "value", "unit", "at_least", "at_most", "note"}
    return Findings(
        figures=[
            Figure(**{name: item for name, item in figure.items() if name in known})
            for figure in value["figures"]
        ],
        failures=list(value["failures"]),
        skips=list(value["skips"]),
        done=bool(value["done"]),
    )


def read(path: Path) -> Findings:
    """What a part left at `path`; nothing at all if it never got that far."""
    try:
        return decode(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return Findings(failures=["it left no findings"])


def write_json(path: Path, value: Any) -> None:
    """Whoever reads `path` sees all of it or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(beside, path)


def _plain(value: float | str) -> float | str:
    return value if isinstance(value, str) or math.isfinite(value) else str(value)
