"""Clients' side of the coordinator: checks, credits, delivery."""

import json
from pathlib import Path

import msgspec
import pytest

from pipemax.coordinator.events import FinishRequest
from pipemax.coordinator.sessions import Sessions, derived_seed
from pipemax.coordinator.text.processor import TextProcessor
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import InvariantError, RequestError
from pipemax.proto.messages.control import RowLogprobs
from pipemax.proto.messages.ingest import Finished, SamplingParams, Submit, TokenLogprob
from pipemax.proto.messages.types import Message, pack_f32, pack_i32


class Line:
    """A client's socket: takes messages, is full, or is gone."""

    def __init__(self) -> None:
        self.state = "open"
        self.got: list[Message] = []

    def send(self, client: bytes, message: Message) -> None:
        if self.state == "full":
            raise BlockingIOError
        if self.state == "gone":
            raise ConnectionError
        self.got.append(message)


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def sessions(tmp_path: Path, line: Line) -> Sessions:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "eos_token_id": 2}))
    config = EngineConfig(
        model=str(tmp_path),
        served_model_name="m",
        layer_split=(1,),
        max_model_len=50,
        client_credits=3,
    )
    return Sessions(config, TextProcessor(tmp_path), line.send)


def submit(request_id: str, seed: int | None = None) -> Submit:
    return Submit(
        request_id=request_id,
        prompt_token_ids=(5, 6, 7),
        sampling=SamplingParams(max_tokens=4, seed=seed),
    )


def done(key: int) -> FinishRequest:
    return FinishRequest(key, (8, 9), "length", None, 11.0, 12.0)


def test_a_result_reaches_its_client_with_its_own_id(sessions: Sessions, line: Line) -> None:
    event = sessions.accept(b"a", submit("x"), 10.0)
    assert list(event.prompt_token_ids) == [5, 6, 7]
    sessions.finish(done(event.key), 13.0)
    assert sessions.deliver() == []
    (message,) = line.got
    assert isinstance(message, Finished)
    assert (message.request_id, message.token_ids) == ("x", (8, 9))
    assert (message.queue_s, message.first_token_s, message.total_s) == (1.0, 2.0, 3.0)
    assert sessions.is_idle


def test_logprobs_and_the_prompt_come_back(sessions: Sessions, line: Line) -> None:
    sampling = SamplingParams(max_tokens=4, logprobs=1, prompt_logprobs=0)
    asking = msgspec.structs.replace(submit("x"), sampling=sampling, echo=True)
    key = sessions.accept(b"a", asking, 10.0).key
    for target in (6, 7):
        sessions.scored(key, RowLogprobs(0, 3, pack_i32([target]), pack_f32([-0.5])))
    sessions.token(key, 8, RowLogprobs(0, 2, pack_i32([8, 9]), pack_f32([-2.0, -0.25])))
    with pytest.raises(InvariantError, match="without the logprobs"):
        sessions.token(key, 9)
    ended = sessions.finish(done(key), 13.0)
    assert ended is not None
    message = ended[1]
    assert message.prompt_logprobs == (
        (TokenLogprob(5, "token_id:5", None, 0),),
        (TokenLogprob(6, "token_id:6", -0.5, 3),),
        (TokenLogprob(7, "token_id:7", -0.5, 3),),
    )
    assert message.logprobs == (
        (TokenLogprob(8, "token_id:8", -2.0, 2), TokenLogprob(9, "token_id:9", -0.25, 1)),
    )
    assert message.prompt_text == ""


def test_a_grammar_that_was_not_followed_is_an_error(sessions: Sessions, line: Line) -> None:
    key = sessions.accept(b"a", submit("x"), 10.0).key
    ended = sessions.finish(FinishRequest(key, (8,), "error", None, 11.0, 12.0), 13.0)
    assert ended is not None
    assert (ended[1].error or "").startswith("structured_outputs: ")


def test_choices_come_together(sessions: Sessions, line: Line) -> None:
    params = SamplingParams(max_tokens=4, n=3)
    first = sessions.accept(b"a", msgspec.structs.replace(submit("x"), sampling=params), 10.0)
    after = sessions.accept(b"a", submit("y"), 10.0)
    assert after.key == first.key + 3
    assert sessions.num_choices(first.key) == 3
    second = FinishRequest(first.key + 1, (1,), "stop", 1, 11.5, 11.75)
    third = FinishRequest(first.key + 2, (), "abort", None, None, None)
    assert sessions.finish(second, 12.0) is None
    assert sessions.finish(done(first.key), 12.5) is None
    assert sessions.deliver() == []
    assert sessions.num_choices(first.key) == 3  # to cancel them all
    assert sessions.finish(third, 14.0) is not None
    sessions.deliver()
    (message,) = line.got
    assert isinstance(message, Finished)
    assert (message.token_ids, message.finish_reason) == ((8, 9), "length")
    assert [(c.token_ids, c.finish_reason) for c in message.more_choices] == [
        ((1,), "stop"),
        ((), "abort"),
    ]
    assert message.num_output_tokens == 3
    assert (message.queue_s, message.first_token_s, message.total_s) == (1.0, 1.75, 4.0)
    assert sessions.num_choices(first.key) == 1


def test_a_modelled_device_has_no_logprobs(sessions: Sessions) -> None:
    msgspec.structs.force_setattr(sessions._config, "device", "modelled")
    for fields in ({"logprobs": 0}, {"prompt_logprobs": 0}):
        asking = msgspec.structs.replace(submit("x"), sampling=SamplingParams(**fields))
        with pytest.raises(RequestError, match="a modelled device") as refusal:
            sessions.accept(b"a", asking, 0.0)
        assert refusal.value.code == "not_implemented"


def test_ids_are_unique_per_client_among_unfinished_requests(sessions: Sessions) -> None:
    sessions.accept(b"a", submit("x"), 0.0)
    sessions.accept(b"b", submit("x"), 0.0)
    with pytest.raises(RequestError, match="still unfinished"):
        sessions.accept(b"a", submit("x"), 0.0)


def test_credits_count_results_not_yet_taken(sessions: Sessions, line: Line) -> None:
    events = [sessions.accept(b"a", submit(str(i)), 0.0) for i in range(3)]
    line.state = "full"
    sessions.finish(done(events[0].key), 1.0)
    sessions.deliver()
    with pytest.raises(RequestError) as refusal:
        sessions.accept(b"a", submit("3"), 0.0)
    assert refusal.value.code == "no_credit"
    sessions.accept(b"b", submit("3"), 0.0)
    line.state = "open"
    sessions.deliver()
    sessions.accept(b"a", submit("3"), 0.0)


def test_requests_of_a_client_that_left_are_given_up(sessions: Sessions, line: Line) -> None:
    events = [sessions.accept(b"a", submit(str(i)), 0.0) for i in range(3)]
    line.state = "gone"
    sessions.finish(done(events[0].key), 1.0)
    orphans = sessions.deliver()
    assert sorted(orphans) == [events[1].key, events[2].key]
    assert sessions.undelivered == 1


def test_a_refused_request_leaves_no_session(sessions: Sessions) -> None:
    with pytest.raises(RequestError):
        sessions.accept(b"a", Submit(request_id="x", prompt_token_ids=(5,) * 60), 0.0)
    assert sessions.is_idle


def test_seeds_depend_on_the_request_alone(sessions: Sessions) -> None:
    first = sessions.accept(b"a", submit("x"), 0.0)
    sessions.accept(b"a", submit("y"), 0.0)
    again = sessions.accept(b"b", submit("x"), 0.0)
    assert first.seed == again.seed == derived_seed(0, "x")
    assert sessions.accept(b"b", submit("z", seed=-1), 0.0).seed == 2**64 - 1


def test_requests_of_one_connection_are_one_job(sessions: Sessions) -> None:
    first = sessions.accept(b"a", submit("x"), 0.0)
    second = sessions.accept(b"a", submit("y"), 0.0)
    other = sessions.accept(b"b", submit("x"), 0.0)
    assert first.job == second.job != other.job


def test_a_client_that_waits_for_each_result_stays_one_job(sessions: Sessions) -> None:
    first = sessions.accept(b"a", submit("x"), 0.0)
    sessions.finish(done(first.key), 1.0)
    sessions.deliver()
    assert sessions.is_idle
    assert sessions.accept(b"a", submit("y"), 2.0).job == first.job


def test_a_request_of_a_durable_job_needs_no_session(sessions: Sessions, line: Line) -> None:
    first = sessions.accept_for_job(7, submit("x"), 10.0)
    same_id = sessions.accept_for_job(7, submit("x"), 10.0)
    assert first.seed == same_id.seed == sessions.accept(b"\x07", submit("x"), 0.0).seed
    assert first.job == same_id.job
    assert first.job != sessions.accept(b"\x07", submit("y"), 0.0).job
    ended = sessions.finish(done(first.key), 13.0)
    assert ended is not None
    key, message = ended
    assert key == first.key
    assert (message.request_id, message.token_ids, message.total_s) == ("x", (8, 9), 3.0)
    assert sessions.deliver() == []
    assert line.got == []
