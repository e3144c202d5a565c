"""Rows of modelled stages travel through the real channels."""

from pathlib import Path

import numpy as np
import pytest
import zmq

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import PipemaxSystemError
from pipemax.stage_worker.channels.connect import open_neighbours
from pipemax.stage_worker.channels.keys import create_activation_keys
from pipemax.stage_worker.channels.ring import RingShape
from pipemax.stage_worker.modelled.ring import ROW_NUMBERS, ModelledRingMemory
from support.command import eventually

SHAPE = RingShape(num_slots=2, max_rows=5, hidden_size=ROW_NUMBERS, dtype="uint64")


def rows(count: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
    return np.arange(2 * count, dtype=np.uint64).reshape(count, 2) + np.uint64(2**63)


def test_both_ends_of_a_ring_are_one_memory() -> None:
    memory = ModelledRingMemory()
    mine = memory.allocate_ring(SHAPE)
    theirs = memory.open_ring(mine.handle, SHAPE)
    mine.write(1, rows(3))
    assert np.array_equal(theirs.read(1, 3), rows(3))
    assert not theirs.read(0, 5).any()
    assert theirs.frame(1, 3) == memory.frame(rows(3))
    handle = mine.handle
    theirs.close()
    mine.close()
    with pytest.raises(PipemaxSystemError):
        memory.open_ring(handle, SHAPE)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_rows_arrive_as_sent(runtime_dir: Path, transport: str) -> None:
    config = EngineConfig(
        model="none",
        served_model_name="none",
        pipeline_parallel_size=2,
        layer_split=(1, 1),
        max_model_len=64,
        activation_transport=transport,  # type: ignore[arg-type]
    )
    create_activation_keys(runtime_dir)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    memory = ModelledRingMemory()
    ends = [
        open_neighbours(context, config, runtime_dir, stage=stage, memory=memory, shape=SHAPE)
        for stage in range(2)
    ]
    sender, receiver = ends[0].next, ends[1].previous
    assert sender is not None
    assert receiver is not None
    try:
        sender.reset(1)
        receiver.reset(1)

        def agreed() -> bool:
            sender.offer()
            assert list(receiver.poll()) == []
            sender.poll()
            return sender.agreed

        assert eventually(agreed, 20)
        for step in range(4):
            sender.send(1, step, step % 2, rows(5 - step))
            found = []
            assert eventually(lambda found=found: found.extend(receiver.poll()) or found, 20)
            assert found[0].step == step
            assert np.array_equal(found[0].rows, rows(5 - step))
            del found
    finally:
        for end in ends:
            end.close()
        context.destroy(linger=0)
