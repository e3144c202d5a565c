"""How many replicas there are, and what each is handed at a time."""

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.ray.sizing import Needs, Sizing, needs_of, replicas_in, sizing

GPU_NODES = [{"CPU": 16.0}, {"CPU": 32.0, "GPU": 8.0}, {"CPU": 32.0, "GPU": 6.0}]


def test_a_gpu_for_each_stage() -> None:
    needs = needs_of(GPU_NODES, device="cuda", stages=4, threads=None)
    assert needs.remote_args == {"num_gpus": 4}
    assert replicas_in(GPU_NODES, needs) == 3


def test_a_node_for_each_replica_on_cpus() -> None:
    nodes = [{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1.0}]
    needs = needs_of(nodes, device="cpu", stages=2, threads=None)
    assert needs == Needs("CPU", 4)
    assert replicas_in(nodes, needs) == 3  # two of the size of the smallest on the largest


def test_as_many_cpus_as_threads() -> None:
    nodes = [{"CPU": 8.0}] * 3
    assert replicas_in(nodes, needs_of(nodes, device="cpu", stages=2, threads=3)) == 3


@pytest.mark.parametrize(
    ("device", "threads", "says"),
    [
        ("cuda", None, "needs 9 GPUs on one node, and the largest of 3 nodes has 8; lower"),
        ("cpu", 4, "needs 36 CPUs on one node, and the largest of 3 nodes has 32; lower"),
    ],
)
def test_no_room(device: str, threads: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        needs_of(GPU_NODES, device=device, stages=9, threads=threads)


@pytest.mark.parametrize(
    ("num_requests", "replicas", "capacity", "asked", "expected"),
    [
        (1_000_000, 2, 1024, None, Sizing(512, 4)),  # half a capacity, twice a capacity in all
        (600, 3, 512, None, Sizing(25, 8)),  # an eighth of a replica's share
        (3, 8, 512, None, Sizing(1, 8)),
        (100_000_000, 2, 1024, None, Sizing(12208, 2)),  # no more batches than Ray likes
        (600, 3, 512, 100, Sizing(100, 8)),
        (600, 3, 512, 5000, Sizing(5000, 2)),
    ],
)
def test_sizing(
    num_requests: int, replicas: int, capacity: int, asked: int | None, expected: Sizing
) -> None:
    assert sizing(num_requests, replicas, capacity, asked) == expected
