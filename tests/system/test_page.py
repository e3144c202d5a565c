"""The built-in page in a browser, of a running system."""

import urllib.request
from pathlib import Path

import pytest

from pipemax.proto.states import STATES
from support.browser import Browser
from support.monitored_system import JOB, busy_system, http_target

_PAINTED = """(() => {
  const canvas = document.getElementById("gantt");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const found = new Set();
  for (let i = 0; i < pixels.length; i += 4) {
    if (pixels[i + 3] === 255) {
      const hex = [0, 1, 2].map((n) => pixels[i + n].toString(16).padStart(2, "0"));
      found.add("#" + hex.join(""));
    }
  }
  return COLOURS.filter((colour) => found.has(colour)).length;
})()"""
_INSIDE = """[...document.querySelectorAll("section, table, canvas, h2, footer")].every(
  (one) => one.getBoundingClientRect().right <= innerWidth + 1)"""


@pytest.mark.parametrize("stages", [2])
def test_the_page_shows_a_running_system(stages: int, tmp_path: Path) -> None:
    with busy_system(stages=stages) as system:
        url = f"http://{http_target(system)}/"
        with Browser(tmp_path / "profile") as browser:
            browser.open(url)
            browser.wait_for("typeof seen !== 'undefined' && seen.length > 2 && spans.size > 1")
            browser.wait_for(f"{_PAINTED} >= 3")
            table = browser.value("document.getElementById('stages').innerText")
            for state in STATES:
                assert state in table
            shares = browser.value(
                "[...document.querySelectorAll('#stages tbody tr')].map((row) => "
                "[...row.cells].slice(-6).reduce((sum, one) => sum + parseFloat(one.innerText), 0))"
            )
            assert shares == pytest.approx([100.0] * stages, abs=0.4)
            browser.wait_for(f"document.getElementById('jobs').innerText.includes('{JOB}')")
            assert browser.value("document.getElementById('trouble').hidden")
            assert browser.value(_INSIDE)
            browser.value("document.querySelector('[data-window=\"1\"]').click()")
            assert browser.value("windowS") == 1
            browser.screenshot(tmp_path / "page.png")
            assert browser.problems == []
            system.kill("coordinator")
            assert browser.wait_for("!document.getElementById('trouble').hidden")
        assert (tmp_path / "page.png").stat().st_size > 10_000


def test_metrics_and_health_are_where_they_were() -> None:
    with busy_system(requests=100) as system:
        for path, expected in (("metrics", b"pipemax_stage_seconds_total{"), ("health", b"ready")):
            url = f"http://{http_target(system)}/{path}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert expected in answer.read()
