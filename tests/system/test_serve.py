"""OpenAI's own client, unchanged, on a real system behind `pipemax serve`: chats, completions and
batches, streamed or not, also while the coordinator dies."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import openai
import pytest

from pipemax.coordinator.journal_file import state_root
from pipemax.services.tiny_model import ModelShape, make_demo_model
from support.http_server import HttpServer
from support.local_system import LocalSystem, small_config

SHAPE = ModelShape(
    num_layers=2, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2, vocab_size=400
)
CHAT: Any = [
    {"role": "system", "content": "Speak of water."},
    {"role": "user", "content": "Where does it flow?"},
]


@pytest.fixture
def system(tmp_path: Path) -> Iterator[LocalSystem]:
    model_dir = make_demo_model(tmp_path / "model", shape=SHAPE)
    with LocalSystem(small_config(model_dir, stages=2, device_blocks=40)) as system:
        yield system


@pytest.fixture
def client(system: LocalSystem) -> Iterator[openai.OpenAI]:
    with (
        HttpServer(name=system.config.name) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def streamed(client: openai.OpenAI, **asked: Any) -> list[dict[str, Any]]:
    """The choices of a stream, put together again."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in client.chat.completions.create(model="tiny", stream=True, **asked):
        for found in chunk.choices:
            choice = choices.setdefault(found.index, {"text": "", "tokens": [], "pieces": 0})
            choice["text"] += found.delta.content or ""
            choice["pieces"] += bool(found.delta.content)
            if found.logprobs is not None and found.logprobs.content is not None:
                choice["tokens"] += [(t.token, t.logprob) for t in found.logprobs.content]
            choice["reason"] = found.finish_reason
    return [choices[index] for index in sorted(choices)]


def whole(client: openai.OpenAI, **asked: Any) -> list[dict[str, Any]]:
    found = client.chat.completions.create(model="tiny", **asked)
    return [
        {
            "text": choice.message.content,
            "tokens": [
                (t.token, t.logprob)
                for t in (choice.logprobs.content if choice.logprobs else None) or ()
            ],
            "reason": choice.finish_reason,
        }
        for choice in found.choices
    ]


def check_streams(client: openai.OpenAI) -> None:
    """A stream is the answer in pieces, whatever was asked for."""
    base: dict[str, Any] = {"messages": CHAT, "max_tokens": 40, "temperature": 0.8, "seed": 5}
    text = whole(client, **base)[0]["text"]
    stop = text[20:24]
    schema = {"type": "object", "properties": {"wet": {"type": "boolean"}}, "required": ["wet"]}
    for asked in (
        {},
        {"n": 3, "logprobs": True, "top_logprobs": 2},
        {"stop": [stop, "never"]},
        {"frequency_penalty": 1.0, "extra_body": {"min_tokens": 3, "repetition_penalty": 1.2}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "w", "schema": {**schema, "additionalProperties": False}},
            }
        },
    ):
        expected, found = whole(client, **base, **asked), streamed(client, **base, **asked)
        for choice in found:
            assert choice.pop("pieces") > 1, asked
        assert found == expected, asked
        if "stop" in asked:
            assert expected[0]["reason"] == "stop"
            assert stop not in found[0]["text"]


def test_openais_client(client: openai.OpenAI) -> None:
    assert client.models.list().data[0].id == "tiny"
    check_streams(client)
    check_completions(client)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="water " * 2000, stream=True)
    assert caught.value.code == "too_long"
    check_batch(client)


def check_completions(client: openai.OpenAI) -> None:
    prompt = "The water"
    found = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=12, temperature=0, logprobs=2, echo=True
    )
    assert found.choices[0].text.startswith(prompt)
    chunks = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=12, temperature=0, stream=True
    )
    assert prompt + "".join(c.choices[0].text for c in chunks) == found.choices[0].text


def check_batch(client: openai.OpenAI) -> None:
    lines = [
        {
            "custom_id": f"id-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "tiny", "messages": CHAT, "max_tokens": 8, "seed": n},
        }
        for n in range(20)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(batch.id)).status != "completed":
        assert batch.status in ("validating", "in_progress", "finalizing"), batch
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert batch.output_file_id is not None
    found = {}
    for text in client.files.content(batch.output_file_id).text.splitlines():
        line = json.loads(text)
        found[line["custom_id"]] = line["response"]["body"]["choices"][0]["message"]["content"]
    assert len(found) == 20
    for n in (0, 19):  # as over HTTP
        expected = whole(client, messages=CHAT, max_tokens=8, seed=n)[0]["text"]
        assert found[f"id-{n}"] == expected


def test_the_command(system: LocalSystem, tmp_path: Path) -> None:
    key = "a-key-of-many-characters"
    main = "from pipemax.services.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", main, "serve", "--name", system.config.name, "--port", "0"]
    environment = {**os.environ, "PIPEMAX_API_KEY": key}
    with (tmp_path / "log").open("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 60
            while (found := re.search(r"http://\S+/v1", log := log_of(output))) is None:
                assert time.monotonic() < deadline, log
                time.sleep(0.05)
            url = found.group()
            with openai.OpenAI(base_url=url, api_key=key, max_retries=10) as client:
                assert client.models.list().data[0].id == "tiny"
                stream = client.chat.completions.create(
                    model="tiny", messages=CHAT, stream=True, max_tokens=5
                )
                assert len(list(stream)) > 2
                client.files.create(file=("a", b"x"), purpose="batch")
            with (
                openai.OpenAI(base_url=url, api_key="wrong") as client,
                pytest.raises(openai.AuthenticationError),
            ):
                client.models.list()
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
        log = log_of(output)
    assert code == 0, log
    assert log.rstrip().endswith("stopped")
    assert key not in log
    assert "Where does it flow" not in log
    assert (state_root() / "t" / "serve" / "files").is_dir(), "beside the system's journal"


def log_of(output: IO[str]) -> str:
    output.seek(0)
    return output.read()


def test_a_stream_outlives_a_coordinator(system: LocalSystem, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 300, "temperature": 0.9, "seed": 7}
    asked["extra_body"] = {"ignore_eos": True}
    expected = whole(client, **asked)
    begun = threading.Event()
    found: list[dict[str, Any]] = []

    def read() -> None:
        text = ""
        for chunk in client.chat.completions.create(model="tiny", stream=True, **asked):
            text += chunk.choices[0].delta.content or ""
            if len(text) > 20:
                begun.set()
        found.append({"text": text})

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    system.kill("coordinator")
    system.start("coordinator")
    thread.join(60)
    assert found
    assert found[0]["text"] == expected[0]["text"]
