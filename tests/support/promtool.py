"""Checks /metrics with Prometheus' own tool."""

import os
import shutil
import subprocess

import pytest

REQUIRE_VARIABLE = "PIPEMAX_REQUIRE_PROMTOOL"


def check_metrics(exposition: str) -> None:
    """Fails when `promtool check metrics` refuses `exposition` or finds fault with a name or help
    text. Skips without promtool, unless `PIPEMAX_REQUIRE_PROMTOOL=1`."""
    promtool = shutil.which("promtool")
    if promtool is None:
        reason = "promtool is not installed (Debian package `prometheus`)"
        if os.environ.get(REQUIRE_VARIABLE) == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=exposition,
        capture_output=True,
        text=True,
        check=False,
    )
    findings = (done.stdout + done.stderr).strip()
    assert done.returncode == 0, findings
    assert findings == ""
