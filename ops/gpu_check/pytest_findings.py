"""pytest plugin: tests as findings of a part, written while they run.

    pytest -p gpu_check.pytest_findings --findings FILE ...

Tests report figures with `record_property("figure", {...})`, whose keys are those of
`FindingsWriter.figure`; see the fixture `figure` in tests/gpu/conftest.py.
"""

from pathlib import Path
from typing import Any

import pytest
from gpu_findings import FindingsWriter

_KEY = pytest.StashKey["_Plugin"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--findings", type=Path, default=None, help="where the findings go")


def pytest_configure(config: pytest.Config) -> None:
    plugin = _Plugin(config.getoption("--findings"))
    config.stash[_KEY] = plugin
    config.pluginmanager.register(plugin, "gpu-check-findings-of-tests")


class _Plugin:
    def __init__(self, path: Path | None) -> None:
        self._writer = FindingsWriter(path)
        self._passed = 0
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.when == "call":
            self._take_figures(report.user_properties)
            self._passed += report.passed
        if report.skipped:
            self._writer.skip(f"{name}: {_why_skipped(report)}")
        if report.failed and name not in self._failed:
            self._failed.add(name)
            self._writer.fail(f"{name}: {_last_line(report)}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._writer.fail(f"{report.nodeid} cannot be read: {_last_line(report)}")
        elif report.skipped:
            self._writer.skip(f"{report.nodeid}: {_why_skipped(report)}")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.INTERRUPTED:
            return
        if self._passed:
            self._writer.figure("tests passed", float(self._passed))
        self._writer.finish()

    def _take_figures(self, properties: list[tuple[str, Any]]) -> None:
        for name, value in properties:
            if name == "figure":
                self._writer.figure(**value)


def _why_skipped(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What pytest says of the error, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr).strip()
    lines = text.splitlines() or [""]
    return (lines[0] if crash is not None else lines[-1])[:400]
