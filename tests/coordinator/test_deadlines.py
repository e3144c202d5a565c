"""Requests that have had the time they were given."""

import itertools
import random
from pathlib import Path

import pytest

from pipemax.coordinator.deadlines import Deadlines
from pipemax.coordinator.events import FinishRequest
from pipemax.coordinator.sessions import Sessions
from pipemax.coordinator.text.processor import TextProcessor
from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.ingest import Finished, SamplingParams, Submit
from pipemax.proto.messages.types import Message


def test_each_key_is_told_once_and_in_time() -> None:
    deadlines, draw = Deadlines(), random.Random(3)
    at = {key: draw.uniform(0, 100) for key in range(500)}
    for key, when in at.items():
        deadlines.set(key, when)
    done = set(draw.sample(sorted(at), 200))
    for key in done:
        deadlines.discard(key)
    told: list[int] = []
    for now in itertools.count(0, 7):
        found = deadlines.over(now)
        assert all(now - 7 < at[key] <= now for key in found)
        told += found
        if now > 100:
            break
    assert sorted(told) == sorted(set(at) - done)
    deadlines.discard(0)


def test_requests_that_are_done_take_no_room() -> None:
    deadlines = Deadlines()
    for key in range(50_000):
        deadlines.set(key, 1e6 + key)
        deadlines.discard(key)
    assert len(deadlines._heap) < 2000


class Clients:
    """Sessions, and what was sent to clients."""

    def __init__(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"vocab_size": 100, "eos_token_id": 2}')
        config = EngineConfig(
            model=str(folder), served_model_name="m", layer_split=(1,), max_model_len=50
        )
        self.sent: list[Message] = []
        self.sessions = Sessions(
            config, TextProcessor(folder), lambda client, message: self.sent.append(message)
        )

    def accept(self, timeout_s: float | None, now: float, n: int = 1) -> int:
        submit = Submit(
            request_id=f"r-{now}",
            prompt_token_ids=(5, 6),
            sampling=SamplingParams(max_tokens=9, n=n, stop_token_ids=(7,)),
            timeout_s=timeout_s,
        )
        return self.sessions.accept(b"a", submit, now).key

    def finish(self, key: int, reason: str, *token_ids: int) -> Finished | None:
        result = FinishRequest(key, token_ids, reason, None, None, None)  # type: ignore[arg-type]
        ended = self.sessions.finish(result, 50.0)
        return None if ended is None else ended[1]


@pytest.fixture
def clients(tmp_path: Path) -> Clients:
    return Clients(tmp_path)


def test_over_time_is_an_error_with_what_there_was(clients: Clients) -> None:
    short, long, endless = (clients.accept(t, 10.0 + i) for i, t in enumerate((5.0, 90.0, None)))
    assert clients.sessions.over_time(14.9) == []
    assert clients.sessions.over_time(15.0) == [short]
    assert clients.sessions.over_time(99.0) == []
    clients.sessions.token(short, 8)
    result = clients.finish(short, "abort", 8)
    assert result is not None
    assert (result.finish_reason, result.error_code) == ("error", "timeout")
    assert "within the time it was given" in str(result.error)
    assert result.token_ids == (8,)
    for key in (long, endless):
        other = clients.finish(key, "length", 8)
        assert other is not None
        assert (other.finish_reason, other.error, other.error_code) == ("length", None, None)
    assert clients.sessions.over_time(1e9) == []


def test_one_that_ended_in_that_very_step_is_no_failure(clients: Clients) -> None:
    key = clients.accept(5.0, 10.0)
    assert clients.sessions.over_time(15.0) == [key]
    result = clients.finish(key, "stop", 7)
    assert result is not None
    assert (result.finish_reason, result.error) == ("stop", None)


def test_cancelling_is_no_failure(clients: Clients) -> None:
    key = clients.accept(5.0, 10.0)
    result = clients.finish(key, "abort")
    assert result is not None
    assert (result.finish_reason, result.error) == ("abort", None)


def test_of_several_choices_those_that_ended_keep_their_end(clients: Clients) -> None:
    key = clients.accept(5.0, 10.0, n=3)
    assert clients.finish(key + 1, "length", 8) is None
    assert clients.sessions.over_time(20.0) == [key]
    assert clients.sessions.num_choices(key) == 3
    assert clients.finish(key, "abort", 8, 8) is None
    result = clients.finish(key + 2, "abort")
    assert result is not None
    assert (result.finish_reason, result.error_code) == ("error", "timeout")
    assert [choice.finish_reason for choice in result.more_choices] == ["length", "abort"]
    assert result.num_output_tokens == 3
