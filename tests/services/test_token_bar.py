"""The progress bar of a batch."""

import io

import pytest
from rich.console import Console

from pipemax.services import token_bar
from pipemax.services.token_bar import TokenBar


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_on_terminals_only(terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    with TokenBar(console) as bar:
        bar.start(4)
        bar.finished(1000)
        bar.finished(0)
    assert ("2/4 requests" in stream.getvalue()) == terminal
    assert ("1,000 tokens" in stream.getvalue()) == terminal
    assert terminal or stream.getvalue() == ""


def test_time_left_is_that_of_the_requests_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(token_bar.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with TokenBar(Console(file=stream, force_terminal=True, width=120)) as bar:
        bar.start(400)
        now += 30
        bar.finished(50)
        bar.finished(70)
    assert "4 tokens/s" in stream.getvalue()
    assert "1:39:30 left" in stream.getvalue()  # 398 more at 15 s each


def test_a_batch_of_nothing_is_no_error() -> None:
    with TokenBar(Console(file=io.StringIO(), force_terminal=True)) as bar:
        bar.start(0)
