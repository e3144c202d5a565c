"""A process that receives activations and says what it got, for the channel tests."""

import time
from pathlib import Path

import zmq

from pipemax.proto.config import load_config
from pipemax.stage_worker.channels.connect import open_neighbours
from pipemax.stage_worker.channels.ring import RingShape
from pipemax.stage_worker.devices.cpu import CpuDevice

SHAPE = RingShape(num_slots=3, max_rows=8, hidden_size=16, dtype="bfloat16")
RESULTS = "results.sock"
DEADLINE_S = 60.0


def body(run_dir: Path, index: int) -> None:
    """Accepts whatever epoch is offered first and pushes `(step, sum of rows)` to RESULTS."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    results = context.socket(zmq.PUSH)
    results.linger = 1000
    results.connect(f"ipc://{run_dir / RESULTS}")
    neighbours = open_neighbours(
        context, load_config(run_dir), run_dir, stage=index, memory=CpuDevice(), shape=SHAPE
    )
    receiver = neighbours.previous
    assert receiver is not None
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        receiver.socket.poll(100)
        for arrival in receiver.poll():
            results.send(b"%d %d" % (arrival.step, int(arrival.rows.float().sum())))
        if not receiver.agreed:
            for epoch in (1, 2):
                receiver.reset(epoch)
                if receiver.agreed:
                    break
