"""A real Prometheus for tests: Debian's package `prometheus`, on a free port, in a folder."""

import http
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import yaml

from support.promtool import REQUIRE_VARIABLE
from support.source_tree import ROOT

OPS = ROOT / "ops"
_START_S = 60.0
_SETTLE_S = 5.0
_COMPARISON = re.compile(r"(?<![=!<>~])(<=|>=|==|!=|<|>)(?![=~])\s*(?!bool\b)")
_QUOTED = re.compile(r'"[^"]*"')
_SELECTOR = re.compile(r"\{[^}]*\}")


def binary(name: str) -> str:
    """Its path. Skips where Prometheus is not installed, unless it has to be."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not installed (Debian package `prometheus`)"
        if os.environ.get(REQUIRE_VARIABLE) == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def without_thresholds(expr: str) -> str:
    """The alert `expr` such that it has a value whether or not anything is wrong: comparisons give
    0 or 1 instead of dropping series."""
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match.group())
        return f"@{len(kept) - 1}@"

    bare = _QUOTED.sub(keep, _SELECTOR.sub(keep, expr))
    bare = _COMPARISON.sub(lambda m: f"{m.group(1)} bool ", bare)
    while re.search(r"@\d+@", bare):
        bare = re.sub(r"@(\d+)@", lambda m: kept[int(m.group(1))], bare)
    return bare


class Prometheus:
    """Scrapes `target` (host:port) as ops/prometheus says, only far more often."""

    def __init__(self, folder: Path, target: str) -> None:
        program = binary("prometheus")
        config = yaml.safe_load((OPS / "prometheus/prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(OPS / "prometheus" / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        path = folder / "prometheus.yaml"
        path.write_text(yaml.safe_dump(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.target = target
        self._url = f"http://127.0.0.1:{port}"
        self._log = folder / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={path}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "GOMAXPROCS": "1"},
            )

    def __enter__(self) -> "Prometheus":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()
        if error is not None:
            error.add_note(self._log.read_text()[-3000:])

    def ask(self, path: str, **parameters: str) -> Any:
        """The answer's `data`. A query that Prometheus refuses fails with its reason. Raises
        ConnectionError while it starts, when it listens but answers in no JSON."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                if error.code == http.HTTPStatus.SERVICE_UNAVAILABLE:
                    raise ConnectionError("it starts") from None
                reason = json.load(error)["error"]
            raise AssertionError(f"{parameters}: {reason}") from None

    def series(self, expr: str) -> list[Any]:
        return list(self.ask("query", query=expr)["result"])

    def wait_for_some(self, expr: str) -> list[Any]:
        """Its series; rules are evaluated one after the other, so a rule's may come late."""
        deadline = time.monotonic() + _SETTLE_S
        while not (found := self.series(expr)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def wait_for(self, expr: str) -> list[Any]:
        """Its series, as soon as there are any."""
        deadline = time.monotonic() + _START_S
        while True:
            try:
                found = self.series(expr)
            except (urllib.error.URLError, ConnectionError):
                found = []  # it starts
            if found:
                return found
            assert time.monotonic() < deadline, f"no series: {expr}"
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            time.sleep(0.1)
