"""Broken input by the ten thousand: a line or a message costs its sender an error and nobody else
anything. The suite sends some; `make test-full PYTEST_ARGS=tests/system/test_fuzz.py` sends all."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from pipemax.proto.errors import WireError
from pipemax.proto.messages import ingest
from pipemax.proto.messages.registry import CONTROL, INGEST
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.wire import Codec, encode
from pipemax.services.batch.openai_lines import LineError, parse_line
from pipemax.services.batch.openai_results import error_line
from support.local_system import LocalSystem, greedy, small_config, tokens_of
from support.messages import EXAMPLES
from support.model_zoo import build_model, reference_tokens
from support.mutate import broken_bytes, broken_json

FEW, MANY = 2_000, 100_000
MEMORY_GROWTH_BYTES = 200 * 2**20
LINES: list[dict[str, Any]] = [
    {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": [1, 2, 3], "max_tokens": 3, "temperature": 0.5,
                 "top_p": 0.9, "top_k": 4, "min_p": 0.1, "stop": ["x"], "seed": 3, "n": 1,
                 "ignore_eos": True, "logprobs": None},
    },
    {
        "custom_id": "b",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "hello"},
                 {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
                 "max_completion_tokens": 3, "stop": "y", "tools": []},
    },
]  # fmt: skip
AMOUNTS = [FEW, pytest.param(MANY, marks=[pytest.mark.full, pytest.mark.timeout(900)])]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_batch_lines(amount: int) -> None:
    """Each is a request that the coordinator can read, or a LineError."""
    draw = random.Random(amount)
    codec = Codec(INGEST, at_binder=True)
    understood = refused = 0
    for _ in range(amount):
        line = broken_json(draw, LINES)
        try:
            submit = parse_line(line, "m").submit
        except LineError as error:
            error_line(
                error.custom_id, "r", status=400, code=error.code, message=str(error), line=1
            )
            refused += 1
            continue
        try:
            codec.decode(encode(submit))
            understood += 1
        except (WireError, TypeError, ValueError, OverflowError):
            refused += 1  # the client looks before it sends, and gives an error line
    assert understood > amount / 200, "the mutations leave too little"
    assert refused > amount / 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def system(model_dir: Path) -> Iterator[LocalSystem]:
    with LocalSystem(small_config(model_dir, stages=1)) as running:
        yield running


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("channel", [INGEST, CONTROL], ids=lambda channel: channel.name)
def test_messages(system: LocalSystem, model_dir: Path, channel: Any, amount: int) -> None:
    """The coordinator lives, stays small and serves others while they come."""
    draw = random.Random(f"{channel.name} {amount}")
    samples = [
        encode(message) for message in EXAMPLES if isinstance(message, channel.to_binder)
    ] + [encode(ingest.Submit(request_id="r", prompt_token_ids=(1, 2), sampling=greedy(2)))]
    prompts = [[draw.randrange(3, 512) for _ in range(20)] for _ in range(4)]
    expected = reference_tokens(model_dir, prompts, [8] * 4)
    coordinator = psutil.Process(system.processes["coordinator"].pid)
    with system.client() as client, zmq.Context() as context:
        system.wait_ready(client)
        before = coordinator.memory_info().rss
        hostile = context.socket(zmq.DEALER)
        hostile.linger = 0
        hostile.connect(socket_endpoint(system.run_dir, channel.name))
        for index in range(amount):
            send(hostile, broken_bytes(draw, samples))
            if index % (amount // 4) == 0:
                assert tokens_of(client.generate(prompts, [greedy(8)] * 4)) == expected
        assert tokens_of(client.generate(prompts, [greedy(8)] * 4)) == expected
        assert coordinator.is_running()
        assert coordinator.memory_info().rss - before < MEMORY_GROWTH_BYTES
        hostile.close()


def send(socket: "zmq.Socket[bytes]", frame: bytes) -> None:
    """Answers are read and forgotten, so that the coordinator need not keep them."""
    give_up = time.monotonic() + 30
    while True:
        try:
            while socket.poll(0, zmq.POLLIN):
                socket.recv_multipart(zmq.NOBLOCK)
            socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            assert time.monotonic() < give_up, "the coordinator takes no more messages"
            socket.poll(20, zmq.POLLOUT)
        else:
            return
