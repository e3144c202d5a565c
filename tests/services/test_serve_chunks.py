"""Chunks by themselves, as each piece of output makes one."""

from typing import Any

from pipemax.client import Choice, ChoiceDelta, Completion
from pipemax.proto.messages.ingest import TokenLogprob
from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL, ResultForm
from pipemax.services.serve.chunks import ChunkWriter, event

DONE = Completion(
    request_id="r",
    token_ids=(1, 2),
    text="ab",
    finish_reason="stop",
    stop_reason="!",
    num_prompt_tokens=3,
    more_choices=(Choice(token_ids=(4,), text="c", finish_reason="length"),),
)


def writer(url: str, *, include_usage: bool = False, **form: Any) -> ChunkWriter:
    return ChunkWriter(
        ResultForm(url=url, **form), "r", 2, model_name="m", created=5, include_usage=include_usage
    )


def delta(index: int, text: str, *logprobs: str) -> ChoiceDelta:
    found = tuple((TokenLogprob(9, word, -0.5, 1),) for word in logprobs)
    return ChoiceDelta(index=index, token_ids=(9,), text=text, logprobs=found or None)


def test_each_choice_counts_its_own_offsets() -> None:
    chunks = writer(COMPLETIONS_URL, logprobs=0)
    offsets = []
    for piece in (delta(0, "a", "a", "bc"), delta(1, "x", "x"), delta(0, "d", "d")):
        (choice,) = chunks.delta(piece)["choices"]
        offsets.append((choice["index"], choice["logprobs"]["text_offset"]))
    assert offsets == [(0, [0, 1]), (1, [0]), (0, [3])]


def test_a_chat() -> None:
    chunks = writer(CHAT_URL)
    first = list(chunks.first())
    assert [chunk["choices"][0]["index"] for chunk in first] == [0, 1]
    assert first[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks.delta(delta(1, "hm")) == {
        "id": "chatcmpl-r",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "m",
        "choices": [
            {"index": 1, "logprobs": None, "finish_reason": None, "delta": {"content": "hm"}}
        ],
    }
    last = [chunk["choices"][0] for chunk in chunks.last(DONE)]
    assert [(c["finish_reason"], c["stop_reason"], c["delta"]) for c in last] == [
        ("stop", "!", {}),
        ("length", None, {}),
    ]


def test_a_completion_with_usage_and_token_ids() -> None:
    chunks = writer(COMPLETIONS_URL, include_usage=True, token_ids=True)
    assert list(chunks.first()) == []
    shown = chunks.delta(delta(0, "hm"))
    assert (shown["object"], shown["usage"]) == ("text_completion", None)
    assert (shown["choices"][0]["text"], shown["choices"][0]["token_ids"]) == ("hm", (9,))
    *ends, usage = chunks.last(DONE)
    assert len(ends) == 2
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_an_event_is_one_line() -> None:
    assert event({"a": "b\nc"}) == b'data: {"a":"b\\nc"}\n\n'
