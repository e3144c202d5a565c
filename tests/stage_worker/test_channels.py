"""Activation channels: both transports, one behaviour."""

import contextlib
import dataclasses
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from pipemax.proto.config import EngineConfig, save_config
from pipemax.proto.errors import ConfigError, InvariantError, WireError
from pipemax.proto.messages.activations import ActivationReady, RingOffer
from pipemax.proto.messages.registry import ACTIVATIONS
from pipemax.proto.sockets import identity_of, make_dealer
from pipemax.proto.wire import encode
from pipemax.stage_worker.channels.connect import Neighbours, open_neighbours
from pipemax.stage_worker.channels.keys import (
    KEYS_FILE,
    create_activation_keys,
    endpoint_file,
    load_activation_keys,
)
from pipemax.stage_worker.channels.receiver import ActivationReceiver, Arrival
from pipemax.stage_worker.channels.ring import RingShape
from pipemax.stage_worker.channels.sender import ActivationSender
from pipemax.stage_worker.devices.cpu import CpuDevice
from support.forkserver import running, start_process
from support.ring_child import RESULTS, SHAPE

DEADLINE_S = 20.0
DEADLINE_MS = 20_000
BODY = "support.ring_child:body"


class Stages:
    """Two neighbouring stages' channels in one process, each end with its own context."""

    def __init__(self, run_dir: Path, transport: str) -> None:
        self.run_dir = run_dir
        self.config = EngineConfig(
            model="none",
            served_model_name="none",
            pipeline_parallel_size=2,
            layer_split=(1, 1),
            max_model_len=64,
            activation_transport=transport,  # type: ignore[arg-type]
        )
        save_config(self.config, run_dir)
        if transport == "tcp":
            create_activation_keys(run_dir)
        self._open: dict[int, tuple[zmq.Context[zmq.Socket[bytes]], Neighbours]] = {}

    def start(self, stage: int, shape: RingShape = SHAPE) -> Neighbours:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            neighbours = open_neighbours(
                context, self.config, self.run_dir, stage=stage, memory=CpuDevice(), shape=shape
            )
        except BaseException:
            context.destroy(linger=0)
            raise
        self._open[stage] = (context, neighbours)
        return neighbours

    def sender(self) -> ActivationSender:
        sender = self.start(0).next
        assert sender is not None
        return sender

    def receiver(self, shape: RingShape = SHAPE) -> ActivationReceiver:
        receiver = self.start(1, shape).previous
        assert receiver is not None
        return receiver

    def stop(self, stage: int) -> None:
        context, neighbours = self._open.pop(stage)
        neighbours.close()
        context.destroy(linger=0)

    def close(self) -> None:
        for stage in list(self._open):
            self.stop(stage)


@pytest.fixture(params=["shm", "tcp"])
def stages(request: pytest.FixtureRequest, runtime_dir: Path) -> Iterator[Stages]:
    stages = Stages(runtime_dir, request.param)
    yield stages
    stages.close()


def until(done: Callable[[], bool], again: Callable[[], object]) -> None:
    """Repeats `again` until `done`."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < deadline_s, "nothing happened"
        again()
        time.sleep(0.005)


def agree(sender: ActivationSender, receiver: ActivationReceiver, epoch: int) -> None:
    sender.reset(epoch)
    receiver.reset(epoch)
    offer_until_agreed(sender, receiver)


def offer_until_agreed(sender: ActivationSender, receiver: ActivationReceiver) -> None:
    def again() -> None:
        sender.offer()
        time.sleep(0.02)
        assert list(receiver.poll()) == []
        sender.poll()

    until(lambda: sender.agreed and receiver.agreed, again)


def receive(receiver: ActivationReceiver, count: int) -> list[Arrival]:
    arrivals: list[Arrival] = []
    until(lambda: len(arrivals) >= count, lambda: arrivals.extend(receiver.poll()))
    return arrivals


def some_rows(step: int, count: int, shape: RingShape = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, shape.hidden_size, generator=generator).to(torch.bfloat16)


def test_rows_arrive_as_sent_however_often_slots_are_reused(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    agree(sender, receiver, 1)
    for step in range(20):
        rows = some_rows(step, 1 + step % SHAPE.max_rows)
        sender.send(1, step, step % SHAPE.num_slots, rows)
        (arrival,) = receive(receiver, 1)
        assert (arrival.epoch, arrival.step) == (1, step)
        assert torch.equal(arrival.rows, rows)


def test_slots_do_not_disturb_each_other(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    agree(sender, receiver, 1)
    sent = [some_rows(step, SHAPE.max_rows) for step in range(SHAPE.num_slots)]
    for step, rows in enumerate(sent):
        sender.send(1, step, step, rows)
    arrivals = receive(receiver, SHAPE.num_slots)
    assert [arrival.step for arrival in arrivals] == [0, 1, 2]
    for arrival, rows in zip(arrivals, sent, strict=True):
        assert torch.equal(arrival.rows, rows)


def test_rows_that_share_memory_with_others_arrive_as_sent(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    agree(sender, receiver, 1)
    wide = torch.randn(4, 2 * SHAPE.hidden_size).to(torch.bfloat16)
    sender.send(1, 0, 0, wide[:, ::2])
    (arrival,) = receive(receiver, 1)
    assert torch.equal(arrival.rows, wide[:, ::2])


def test_an_older_epoch_does_not_arrive(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    agree(sender, receiver, 3)
    sender.send(2, 0, 0, some_rows(0, 1))
    sender.send(3, 1, 0, some_rows(1, 1))
    assert [arrival.step for arrival in receive(receiver, 1)] == [1]


def test_an_offer_that_comes_before_the_reset_waits_for_it(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    agree(sender, receiver, 1)
    sender.reset(2)
    sender.offer()
    receiver.socket.poll(DEADLINE_MS)
    assert list(receiver.poll()) == []
    receiver.reset(2)
    assert receiver.agreed
    until(lambda: sender.agreed, sender.poll)


def test_an_older_offer_is_not_accepted(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    receiver.reset(2)
    sender.reset(1)
    sender.offer()
    receiver.socket.poll(DEADLINE_MS)
    assert list(receiver.poll()) == []
    assert not receiver.agreed


def test_an_older_acceptance_does_not_count(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    sender.reset(1)
    receiver.reset(1)
    sender.offer()
    receiver.socket.poll(DEADLINE_MS)
    assert list(receiver.poll()) == []
    assert receiver.agreed
    sender.reset(2)
    sender.socket.poll(DEADLINE_MS)
    sender.poll()
    assert not sender.agreed


def test_rows_before_agreement_are_an_error(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    receiver.reset(1)
    sender.reset(0)
    sender.offer()  # of an older epoch: connects, but is not accepted
    sender.send(1, 0, 0, some_rows(0, 1))
    with pytest.raises(WireError, match="before the ring was agreed"):
        receive(receiver, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slots": 4}, "num_slots is 3 there and 4 here"),
        ({"max_rows": 9}, "max_rows is 8 there and 9 here"),
        ({"hidden_size": 32}, "hidden_size is 16 there and 32 here"),
        ({"dtype": "float32"}, "dtype is bfloat16 there and float32 here"),
    ],
)
def test_another_shape_is_refused(stages: Stages, change: dict[str, object], message: str) -> None:
    sender = stages.sender()
    receiver = stages.receiver(dataclasses.replace(SHAPE, **change))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        agree(sender, receiver, 1)


def test_what_does_not_fit_is_not_sent(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    agree(sender, receiver, 1)
    with pytest.raises(InvariantError, match="9 rows"):
        sender.send(1, 0, 0, some_rows(0, 9))
    with pytest.raises(InvariantError, match="slot 3"):
        sender.send(1, 0, 3, some_rows(0, 1))
    with pytest.raises(InvariantError, match="rows of 8"):
        sender.send(1, 0, 0, torch.zeros(1, 8, dtype=torch.bfloat16))


def test_a_restarted_receiver_is_found_again(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    agree(sender, receiver, 1)
    sender.send(1, 0, 0, some_rows(0, 1))  # lost: nobody reads it
    stages.stop(1)
    receiver = stages.receiver()
    agree(sender, receiver, 2)
    sender.send(2, 0, 0, some_rows(5, 2))
    (arrival,) = receive(receiver, 1)
    assert (arrival.epoch, arrival.step) == (2, 0)
    assert torch.equal(arrival.rows, some_rows(5, 2))


def test_a_restarted_sender_is_accepted_again(stages: Stages) -> None:
    sender, receiver = stages.sender(), stages.receiver()
    agree(sender, receiver, 1)
    stages.stop(0)
    sender = stages.sender()
    agree(sender, receiver, 2)
    sender.send(2, 0, 1, some_rows(6, 3))
    (arrival,) = receive(receiver, 1)
    assert torch.equal(arrival.rows, some_rows(6, 3))


def test_a_stranger_on_the_socket_is_ignored(runtime_dir: Path) -> None:
    with contextlib.closing(Stages(runtime_dir, "shm")) as stages:
        sender, receiver = stages.sender(), stages.receiver()
        agree(sender, receiver, 1)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stranger = make_dealer(context, ACTIVATIONS, identity_of("stage", 7))
        stranger.connect(f"ipc://{runtime_dir / 'act-1.sock'}")
        stranger.send(encode(ActivationReady(epoch=1, step=0, slot=0, rows=1)))
        receiver.socket.poll(DEADLINE_MS)
        assert list(receiver.poll()) == []
        sender.send(1, 4, 0, some_rows(0, 1))
        assert [arrival.step for arrival in receive(receiver, 1)] == [4]
        context.destroy(linger=0)


@pytest.mark.parametrize(
    ("ready", "extra", "message"),
    [
        (ActivationReady(epoch=1, step=0, slot=3, rows=1), b"", "does not fit"),
        (ActivationReady(epoch=1, step=0, slot=0, rows=9), b"", "does not fit"),
        (ActivationReady(epoch=1, step=0, slot=0, rows=2), b"x" * 63, "64 bytes of rows"),
    ],
)
def test_rows_that_are_not_what_was_announced(
    runtime_dir: Path, ready: ActivationReady, extra: bytes, message: str
) -> None:
    with contextlib.closing(Stages(runtime_dir, "tcp")) as stages:
        sender, receiver = stages.sender(), stages.receiver()
        agree(sender, receiver, 1)
        sender.socket.send_multipart([encode(ready), extra])
        with pytest.raises(WireError, match=message):
            receive(receiver, 1)


def test_making_keys_needs_no_torch() -> None:
    code = "import sys, pipemax.stage_worker.channels.keys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tcp_without_keys_is_refused(runtime_dir: Path) -> None:
    with contextlib.closing(Stages(runtime_dir, "tcp")) as stages:
        (runtime_dir / KEYS_FILE).unlink()
        for stage in (0, 1):
            with pytest.raises(ConfigError, match="need CURVE keys"):
                stages.start(stage)


def test_keys_others_can_read_are_refused(runtime_dir: Path) -> None:
    create_activation_keys(runtime_dir)
    (runtime_dir / KEYS_FILE).chmod(0o640)
    with pytest.raises(ConfigError, match="readable by others"):
        load_activation_keys(runtime_dir)


def test_keys_are_private_and_new_in_every_run(runtime_dir: Path) -> None:
    create_activation_keys(runtime_dir)
    first = load_activation_keys(runtime_dir)
    create_activation_keys(runtime_dir)
    assert load_activation_keys(runtime_dir) != first
    assert stat.S_IMODE((runtime_dir / KEYS_FILE).stat().st_mode) == 0o600
    assert [path.name for path in runtime_dir.iterdir()] == [KEYS_FILE]


@pytest.mark.parametrize("wrong", ["sender", "receiver", "none"])
def test_tcp_lets_only_this_run_in(runtime_dir: Path, wrong: str) -> None:
    """`sender`: knows the receiver's key but has one of its own; `receiver`: expects another
    receiver; `none`: speaks without encryption."""
    with contextlib.closing(Stages(runtime_dir, "tcp")) as stages:
        sender, receiver = stages.sender(), stages.receiver()
        receiver.reset(1)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stranger = make_dealer(context, ACTIVATIONS, identity_of("stage", 0))
        keys = load_activation_keys(runtime_dir)
        if wrong != "none":
            public, secret = zmq.curve_keypair()
            stranger.curve_serverkey = (
                public if wrong == "receiver" else keys.receiver_public.encode()
            )
            stranger.curve_publickey = public
            stranger.curve_secretkey = secret
        refusals = stranger.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_DISCONNECTED
        )
        stranger.connect(endpoint_file(runtime_dir, 1).read_text())
        offer = RingOffer(
            epoch=1, transport="tcp", num_slots=3, max_rows=8, hidden_size=16, dtype="bfloat16"
        )
        stranger.send(encode(offer))
        assert refusals.poll(DEADLINE_MS), "nobody refused the connection"
        assert list(receiver.poll()) == []
        assert not receiver.agreed
        stranger.disable_monitor()
        context.destroy(linger=0)
        agree(sender, receiver, 1)  # and the run's own sender still gets in


def test_an_address_that_is_not_ours_is_refused(runtime_dir: Path) -> None:
    with contextlib.closing(Stages(runtime_dir, "tcp")) as stages:
        stages.config = msgspec.structs.replace(stages.config, activation_host="192.0.2.1")
        with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
            stages.start(1)


def test_between_processes_and_after_a_kill(stages: Stages) -> None:
    sender = stages.sender()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    results = context.socket(zmq.PULL)
    results.bind(f"ipc://{stages.run_dir / RESULTS}")

    def agree_and_send(epoch: int) -> None:
        def again() -> None:
            sender.offer()
            sender.socket.poll(200)
            sender.poll()

        sender.reset(epoch)
        until(lambda: sender.agreed, again)
        for step in range(7):
            rows = torch.full((step + 1, 16), float(step)).to(torch.bfloat16)
            sender.send(epoch, step, step % 3, rows)
            assert results.poll(DEADLINE_MS)
            assert results.recv() == b"%d %d" % (step, 16 * step * (step + 1))

    try:
        child = start_process("stage-1", BODY, stages.run_dir, 1)
        agree_and_send(1)
        child.kill()
        child.join()
        child.close()
        with running("stage-1", BODY, stages.run_dir, 1):
            agree_and_send(2)
    finally:
        context.destroy(linger=0)
