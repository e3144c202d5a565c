"""Broken and hostile peers on the ingest socket cost nobody else anything."""

import random
from collections.abc import Iterator
from pathlib import Path

import msgpack
import psutil
import pytest
import zmq

from pipemax.proto.messages.registry import INGEST
from pipemax.proto.rundir import socket_endpoint
from support.hostile import RawPeer, send_noise, silent_connections
from support.local_system import LocalSystem, greedy, small_config, tokens_of
from support.model_zoo import build_model, reference_tokens

MEMORY_GROWTH_BYTES = 150 * 2**20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def system(model_dir: Path) -> Iterator[LocalSystem]:
    with LocalSystem(small_config(model_dir, stages=1)) as running:
        yield running


def requests(model_dir: Path) -> tuple[list[list[int]], list[int], list[list[int]]]:
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 512) for _ in range(30)] for _ in range(8)]
    return prompts, [20] * 8, reference_tokens(model_dir, prompts, [20] * 8)


def test_others_are_served_while_peers_misbehave(system: LocalSystem, model_dir: Path) -> None:
    prompts, counts, expected = requests(model_dir)
    path = system.run_dir / "ingest.sock"
    with system.client() as client:
        system.wait_ready(client)
        process = psutil.Process(system.processes["coordinator"].pid)
        before = process.memory_info().rss
        for seed in range(50):
            send_noise(path, seed)
        gigabyte = RawPeer(path).handshake()
        gigabyte.send_frame_header(2**30)
        half = RawPeer(path).handshake()
        half.send_frame(b"first half", more=True)
        with silent_connections(path, 10_000) as count:
            assert count >= 9_000 or count >= psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[0] - 64
            completions = client.generate(prompts, [greedy(n) for n in counts])
        assert tokens_of(completions) == expected
        assert gigabyte.is_dropped()
        gigabyte.close()
        half.close()
        assert process.memory_info().rss - before < MEMORY_GROWTH_BYTES
        assert tokens_of(client.generate(prompts, [greedy(n) for n in counts])) == expected


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b"\xc1"], "not_msgpack"),
        ([b""], "not_msgpack"),
        ([msgpack.packb([1, 2])], "not_a_map"),
        ([msgpack.packb({"type": "step_plan"})], "unknown_type"),
        ([msgpack.packb({"type": "submit", "request_id": 7})], "invalid_field"),
        ([msgpack.packb({"type": "submit", "request_id": "a", "prio": 1})], "invalid_field"),
        ([msgpack.packb({"type": "status_query"})[:-2]], "not_msgpack"),
        ([msgpack.packb({"type": "status_query"}), b"x"], "frames"),
    ],
)
def test_a_bad_message_gets_its_sender_an_error(
    system: LocalSystem, frames: list[bytes], code: str
) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(socket_endpoint(system.run_dir, INGEST.name))
    try:
        dealer.send_multipart(frames)
        assert dealer.poll(20_000)
        answer = msgpack.unpackb(dealer.recv())
    finally:
        context.destroy()
    assert answer["type"] == "refused"
    assert answer["code"] == code
    assert answer["message"]


def test_no_client_can_hold_more_than_its_credits(model_dir: Path) -> None:
    config = small_config(model_dir, stages=1, client_credits=4)
    with LocalSystem(config) as system, system.client() as client:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(socket_endpoint(system.run_dir, INGEST.name))
        sampling = {"max_tokens": 300, "ignore_eos": True, "temperature": 0.0}
        for index in range(10):
            message = {"type": "submit", "request_id": str(index), "prompt_token_ids": [5, 6]}
            dealer.send(msgpack.packb({**message, "sampling": sampling}))
        answers: list[dict[str, str]] = []
        while len(answers) < 10 and dealer.poll(60_000):
            answers.append(msgpack.unpackb(dealer.recv()))
        context.destroy()
        refused = [a for a in answers if a["type"] == "refused"]
        assert {a["code"] for a in refused} == {"no_credit"}
        assert len(refused) == 6
        assert len(answers) == 10
        assert tokens_of(client.generate([[5, 6]], greedy(4)))
