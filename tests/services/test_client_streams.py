"""Streamed requests through the client: everything once, in order, whatever happens meanwhile."""

import os
import random
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.client import Client, Completion, Submit
from pipemax.client.streams import StreamReader
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.ingest import (
    Choice,
    ChoiceDelta,
    Finished,
    Partial,
    RequestDelta,
    TokenLogprob,
)
from support.fake_coordinator import FakeCoordinator, finished

TOKENS = tuple(range(10, 30))
TEXT = "".join(chr(65 + n) for n in range(20))
LOGPROBS = tuple((TokenLogprob(token, "t", -1.0, 1),) for token in TOKENS)


def completion(token_ids: tuple[int, ...] = TOKENS) -> Completion:
    return Completion(
        request_id="r",
        token_ids=token_ids,
        text=TEXT,
        finish_reason="length",
        logprobs=LOGPROBS,
        more_choices=(Choice(token_ids=TOKENS, text=TEXT, finish_reason="stop"),),
    )


def pieces(draw: random.Random, upto: int) -> list[ChoiceDelta]:
    """Some of the first choice, its text late, as a coordinator sends it."""
    deltas = []
    told = chars = 0
    while told < upto:
        more = draw.randrange(1, 5)
        until = draw.randrange(chars, min(told + more, 20) + 1)
        deltas.append(
            ChoiceDelta(
                index=0,
                token_ids=TOKENS[told : told + more],
                text=TEXT[chars:until],
                logprobs=LOGPROBS[told : told + more],
            )
        )
        told, chars = told + more, until
    return deltas


@given(st.lists(st.integers(0, 20), max_size=3), st.integers())
def test_everything_once(lives: list[int], seed: int) -> None:
    """Over several lives of a coordinator that runs the request anew in each."""
    draw = random.Random(seed)
    got: list[ChoiceDelta] = []
    reader = StreamReader(got.append)
    for upto in lives:
        reader.start_again()
        for delta in pieces(draw, upto):
            reader.take([delta])
    assert reader.finish(completion()) == completion()
    for index in (0, 1):
        mine = [delta for delta in got if delta.index == index]
        assert tuple(token for delta in mine for token in delta.token_ids) == TOKENS
        assert "".join(delta.text for delta in mine) == TEXT
    logprobs = [position for delta in got for position in delta.logprobs or ()]
    assert tuple(logprobs) == LOGPROBS


def test_other_tokens_than_before_are_a_failure() -> None:
    got: list[ChoiceDelta] = []
    reader = StreamReader(got.append)
    reader.take([ChoiceDelta(index=0, token_ids=TOKENS[:3], text="ABC")])
    reader.start_again()
    reader.take([ChoiceDelta(index=0, token_ids=(10, 99, 12, 13), text="AXCD")])
    result = reader.finish(completion((10, 99, *TOKENS[2:])))
    assert (result.finish_reason, result.error_code) == ("error", "failed")
    assert "other tokens" in (result.error or "")
    assert [delta.text for delta in got] == ["ABC"]


def streaming(submit: Submit) -> list[Partial | Finished]:
    deltas = (
        ChoiceDelta(index=0, token_ids=(1,), text="H"),
        ChoiceDelta(index=0, token_ids=(2, 3), text="EL"),
    )
    partials: list[Partial | Finished] = [
        Partial(
            number=number,
            requests=(RequestDelta(request_id=submit.request_id, choices=(delta,)),),
        )
        for number, delta in enumerate(deltas, 1)
    ]
    return [*partials, finished(submit, token_ids=(1, 2, 3, 4), text="HELLO")]


def test_deltas_come_before_the_completion(runtime_dir: Path) -> None:
    got: list[ChoiceDelta] = []
    submit = Submit(request_id="a", prompt="hello", stream=True)
    with (
        FakeCoordinator(runtime_dir / "i", streaming) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        client.submit(submit, got.append)
        result = client.poll(10.0)
        assert [(delta.token_ids, delta.text) for delta in got] == [
            ((1,), "H"),
            ((2, 3), "EL"),
            ((4,), "LO"),
        ]
        assert result is not None
        assert result.text == "HELLO"
        client.status()  # its answer comes behind what was said before
        assert fake.taken == [1, 2]


def test_streams_and_who_listens_go_together(runtime_dir: Path) -> None:
    with (
        FakeCoordinator(runtime_dir / "i", streaming) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        submit = Submit(request_id="a", prompt="hello", stream=True)
        with pytest.raises(RequestError, match="together"):
            client.submit(submit)
        with pytest.raises(RequestError, match="together"):
            client.submit(msgspec.structs.replace(submit, stream=False), lambda delta: None)


@pytest.mark.parametrize("by", ["message", "file descriptor"])
def test_waiting_ends(runtime_dir: Path, by: str) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with (
            FakeCoordinator(runtime_dir / "i") as fake,
            Client(endpoint=fake.endpoint) as client,
        ):
            if by == "message":
                client.submit(Submit(request_id="a", prompt="hello"))
            else:
                timer = threading.Timer(0.05, os.eventfd_write, (fd, 1))
                timer.start()
            client.wait(60.0, fd)  # the test's own time limit ends one that never does
            if by == "message":
                assert client.poll(0.0) is not None
            else:
                timer.join()
    finally:
        os.close(fd)
