"""What streaming clients are told while their requests run: all of it once, never more at a time
than they take."""

import json
from pathlib import Path

import pytest

from pipemax.coordinator import streams
from pipemax.coordinator.events import FinishRequest
from pipemax.coordinator.sessions import Sessions
from pipemax.coordinator.text.processor import TextProcessor
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.control import RowLogprobs
from pipemax.proto.messages.ingest import Finished, Partial, SamplingParams, Submit, TokenLogprob
from pipemax.proto.messages.types import Message, pack_f32, pack_i32

from .text.conftest import byte_level_tokenizer, write_model_dir


class Line:
    def __init__(self) -> None:
        self.full = self.gone = False
        self.got: list[Message] = []

    def send(self, client: bytes, message: Message) -> None:
        if self.full:
            raise BlockingIOError
        if self.gone:
            raise ConnectionError
        self.got.append(message)

    def take(self) -> list[Message]:
        got, self.got = self.got, []
        return got


@pytest.fixture
def line() -> Line:
    return Line()


def sessions_of(folder: Path, line: Line) -> Sessions:
    config = EngineConfig(
        model=str(folder), served_model_name="m", layer_split=(1,), max_model_len=90
    )
    return Sessions(config, TextProcessor(folder), line.send)


@pytest.fixture
def sessions(tmp_path: Path, line: Line) -> Sessions:
    """Of a model without a tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "eos_token_id": 2}))
    return sessions_of(tmp_path, line)


def submit(request_id: str, *, stream: bool = True, **sampling: object) -> Submit:
    params = SamplingParams(max_tokens=80, **sampling)  # type: ignore[arg-type]
    return Submit(request_id=request_id, prompt_token_ids=(5, 6), sampling=params, stream=stream)


def told(message: Message) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    assert isinstance(message, Partial)
    return {r.request_id: [(c.index, c.token_ids) for c in r.choices] for r in message.requests}


def done(key: int, token_ids: tuple[int, ...]) -> FinishRequest:
    return FinishRequest(key, token_ids, "length", None, 11.0, 12.0)


def test_one_message_for_all_requests_of_a_client(sessions: Sessions, line: Line) -> None:
    keys = [
        sessions.accept(client, submit(name), 0.0).key
        for client, name in ((b"a", "x"), (b"a", "y"), (b"b", "z"))
    ]
    for key, token in zip(keys, (7, 8, 9), strict=True):
        sessions.token(key, token)
    sessions.deliver()
    messages = sorted(map(told, line.take()), key=str)
    assert messages == [{"x": [(0, (7,))], "y": [(0, (8,))]}, {"z": [(0, (9,))]}]
    sessions.deliver()
    assert line.take() == []


def test_who_does_not_stream_is_not_told(sessions: Sessions, line: Line) -> None:
    key = sessions.accept(b"a", submit("x", stream=False), 0.0).key
    sessions.token(key, 7)
    assert not sessions._with_changes
    sessions.deliver()
    assert line.take() == []


def test_a_client_that_takes_nothing_is_sent_two_and_the_rest_in_one(
    sessions: Sessions, line: Line
) -> None:
    key = sessions.accept(b"a", submit("x"), 0.0).key
    for token in range(50):
        sessions.token(key, token)
        sessions.deliver()
    assert [told(m) for m in line.take()] == [{"x": [(0, (0,))]}, {"x": [(0, (1,))]}]
    sessions.taken(b"a", 99)  # as many as there were, no more
    sessions.deliver()
    assert [told(m) for m in line.take()] == [{"x": [(0, tuple(range(2, 50)))]}]
    sessions.token(key, 50)
    sessions.deliver()
    sessions.token(key, 51)
    sessions.deliver()
    assert [told(m) for m in line.take()] == [{"x": [(0, (50,))]}]
    sessions.taken(b"a", 1)  # said before
    sessions.deliver()
    assert line.take() == []
    sessions.taken(b"a", 3)
    sessions.deliver()
    (message,) = line.take()
    assert isinstance(message, Partial)
    assert message.number == 5
    sessions.taken(b"nobody", 1)


def test_a_result_waits_for_nothing(sessions: Sessions, line: Line) -> None:
    key = sessions.accept(b"a", submit("x"), 0.0).key
    for token in range(5):
        sessions.token(key, token)
        sessions.deliver()
    line.take()
    sessions.finish(done(key, tuple(range(5))), 13.0)
    sessions.deliver()
    (message,) = line.take()
    assert isinstance(message, Finished)
    assert message.token_ids == (0, 1, 2, 3, 4)
    assert sessions.is_idle
    assert not sessions._with_changes


def test_a_full_socket_loses_nothing(sessions: Sessions, line: Line) -> None:
    key = sessions.accept(b"a", submit("x"), 0.0).key
    line.full = True
    for token in (7, 8):
        sessions.token(key, token)
        assert sessions.deliver() == []
    line.full = False
    sessions.deliver()
    assert [told(m) for m in line.take()] == [{"x": [(0, (7, 8))]}]


def test_requests_of_a_client_that_left_are_given_up(sessions: Sessions, line: Line) -> None:
    key = sessions.accept(b"a", submit("x"), 0.0).key
    line.gone = True
    sessions.token(key, 7)
    assert sessions.deliver() == [key]
    assert sessions.deliver() == []
    sessions.token(key, 8)
    sessions.finish(done(key, (7, 8)), 1.0)
    sessions.deliver()
    assert sessions.is_idle
    assert not sessions._with_changes


def test_choices_one_of_which_is_finished(sessions: Sessions, line: Line) -> None:
    key = sessions.accept(b"a", submit("x", n=2), 0.0).key
    sessions.token(key, 7)
    sessions.token(key + 1, 8)
    assert sessions.finish(done(key, (7,)), 1.0) is None
    sessions.deliver()
    sessions.taken(b"a", 1)
    sessions.token(key + 1, 9)
    sessions.deliver()
    assert [told(m) for m in line.take()] == [{"x": [(0, (7,)), (1, (8,))]}, {"x": [(1, (9,))]}]


def test_a_message_is_bounded(
    sessions: Sessions, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST_TOKENS", 4)
    keys = [sessions.accept(b"a", submit(name), 0.0).key for name in ("x", "y", "z")]
    for token in range(3):
        for key in keys:
            sessions.token(key, token)
    sessions.deliver()
    assert [told(m) for m in line.take()] == [
        {"x": [(0, (0, 1, 2))], "y": [(0, (0,))]},
        {"y": [(0, (1, 2))], "z": [(0, (0, 1))]},
    ]
    sessions.taken(b"a", 1)
    sessions.deliver()
    assert [told(m) for m in line.take()] == [{"z": [(0, (2,))]}]


def test_logprobs_go_with_their_tokens(sessions: Sessions, line: Line) -> None:
    key = sessions.accept(b"a", submit("x", logprobs=0), 0.0).key
    for token in (7, 8):
        sessions.token(key, token, RowLogprobs(0, 2, pack_i32([token]), pack_f32([-0.5])))
        sessions.deliver()
    for token, message in zip((7, 8), line.take(), strict=True):
        assert isinstance(message, Partial)
        (choice,) = message.requests[0].choices
        assert choice.logprobs == ((TokenLogprob(token, f"token_id:{token}", -0.5, 2),),)


def test_text_is_the_results(tmp_path: Path, line: Line) -> None:
    sessions = sessions_of(write_model_dir(tmp_path, byte_level_tokenizer()), line)
    text = "The pump lifts water, and 水 too"
    token_ids = sessions._text._encode_text(text, 90, add_special_tokens=False)
    key = sessions.accept(b"a", submit("x", stop=("too",)), 0.0).key
    shown = ""
    for position, token in enumerate(token_ids):  # noqa: B007  (used behind it)
        stop = sessions.token(key, token)
        if stop is not None:
            break
        sessions.deliver()
        sessions.taken(b"a", 99)
        for message in line.take():
            assert isinstance(message, Partial)
            shown += message.requests[0].choices[0].text
            assert "\ufffd" not in shown
    else:
        raise AssertionError("the stop string was not met")
    result = FinishRequest(key, tuple(token_ids[: position + 1]), "stop", stop, 1.0, 1.0)
    ended = sessions.finish(result, 2.0)
    assert ended is not None
    assert ended[1].text == "The pump lifts water, and 水 "
    assert ended[1].text.startswith(shown)
    assert len(shown) > 20


def test_jobs_do_not_stream(sessions: Sessions) -> None:
    with pytest.raises(RequestError, match="fetched, not streamed"):
        sessions.accept_for_job(1, submit("x"), 0.0)
    assert sessions.is_idle
