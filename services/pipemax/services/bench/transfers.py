"""How fast the KV daemon's copies are on the CPU, beside one large copy of memory.
`python -m pipemax.services.bench.transfers` is a program of its own, as the daemon is: arguments of
`measure_copies` in, `Copies` out, one JSON object a line."""

import json
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from pipemax.kv_daemon.cpu_engine import CpuEngine
from pipemax.kv_daemon.events import Direction, Run, StartCopy
from pipemax.kv_daemon.host_pool import Blocks, HostPool
from pipemax.proto.memory import SharedMemory
from pipemax.proto.messages.kv import AttachPool


@dataclass(frozen=True, slots=True)
class Copies:
    """Bytes per second, each the best of several attempts in turns."""

    large_bytes_s: float
    """Of one copy of as many bytes, between pools: the limit."""
    malloc_bytes_s: float
    """The same between memory of NumPy's."""
    by_way: dict[str, float]
    """By direction, and whether blocks lie together or scattered."""


def measure_copies(block_bytes: int, num_blocks: int, attempts: int = 5) -> Copies:
    """Of a stage with a device pool, and a host pool, of `num_blocks`; all of them are copied."""
    best: dict[str, float] = {}
    size = block_bytes * num_blocks
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    order = np.random.default_rng(0).permutation(num_blocks).tolist()
    ways = {
        "together": [Run(0, 0, num_blocks)],
        "scattered": [Run(host, device, 1) for device, host in enumerate(order)],
    }
    directions: tuple[Direction, ...] = ("load", "store")
    with _engine(block_bytes, num_blocks) as (engine, host, device):
        for _ in range(attempts + 1):  # the first touches the pages
            found = {"large": _seconds_of_large(host, device)}
            found["malloc"] = _seconds_of_large(source, target)
            for direction in directions:
                for way, runs in ways.items():
                    found[f"{direction}, {way}"] = _seconds_of(engine, direction, runs)
            best = {name: min(s, best.get(name, s)) for name, s in found.items()}
    rates = {name: size / seconds for name, seconds in best.items()}
    return Copies(rates.pop("large"), rates.pop("malloc"), rates)


@contextmanager
def _engine(block_bytes: int, num_blocks: int) -> Iterator[tuple[CpuEngine, Blocks, Blocks]]:
    """With the host's and the device's pool."""
    engine = CpuEngine(1, None)
    pool = HostPool(block_bytes * num_blocks)
    memory = SharedMemory.create("bench-device", block_bytes * num_blocks)
    try:
        regions = pool.regions(num_blocks, (block_bytes,))
        engine.lay_out(regions)
        engine.map_pool(
            AttachPool(
                epoch=0,
                stage=0,
                handle=memory.handle,
                num_blocks=num_blocks,
                block_bytes=block_bytes,
            )
        )
        yield engine, regions[0], np.frombuffer(memory.buffer, np.uint8).reshape(num_blocks, -1)
    finally:
        engine.close()
        pool.close()
        memory.close()


def _seconds_of(engine: CpuEngine, direction: Direction, runs: Sequence[Run]) -> float:
    started = time.perf_counter()
    engine.start(StartCopy(0, direction, tuple(runs)))
    while not engine.completed():
        select.select([engine.fileno()], [], [])
    return time.perf_counter() - started


def _seconds_of_large(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - started


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asdict(measure_copies(**json.loads(line)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
