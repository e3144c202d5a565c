"""The KV daemon process."""

import contextlib
import secrets
from pathlib import Path

from pipemax.kv_daemon.core import DEPTH, PIECE_BYTES, KvCore
from pipemax.kv_daemon.cpu_engine import CpuEngine
from pipemax.kv_daemon.engine import CopyEngine, HostLayout
from pipemax.kv_daemon.host_pool import HostPool
from pipemax.kv_daemon.order_engine import OrderEngine
from pipemax.kv_daemon.regions import GpuHost
from pipemax.kv_daemon.shell import Shell
from pipemax.proto.config import EngineConfig, load_config
from pipemax.proto.process import on_stop_signals

PIECE_S = 0.02
"""On an imitated link, which may be slow, a piece also takes no longer than this."""
MODELLED_PIECE_S = 0.01
"""On a modelled link a piece takes this long: its few real bytes cost nothing, but two threads
switch for every piece, and a machine may run as many links as a server with eight GPUs."""
CUDA_PIECE_BYTES = 32 * 2**20
"""A piece costs the daemon some 0.1 ms of Python. Eight links of 25 GB/s in one direction are 6,000
pieces of this size a second, more than half of what one core does; a more urgent prefetch waits for
CUDA_DEPTH of them, 1.3 ms each on such a link. Activations wait for less: see pinned.COPY_BYTES."""
CUDA_DEPTH = 3
"""Pieces given to a stage's stream: enough to last while its loop launches a step."""
PATIENCE_S = 30.0
"""Stages notice within a second that a daemon died, and then give up what they have pinned."""


def piece_bytes(config: EngineConfig) -> int:
    """Most bytes of one copy: large enough to be fast, small enough to let urgent work pass."""
    bandwidth = config.emulate_link_bandwidth_bytes_s
    if config.cuda is not None:
        return CUDA_PIECE_BYTES
    if bandwidth is None:
        return PIECE_BYTES
    if config.held_block_bytes is not None:
        return max(1, int(bandwidth * MODELLED_PIECE_S))
    return min(PIECE_BYTES, int(bandwidth * PIECE_S))


def body(run_dir: Path, index: int) -> None:
    """Serves until SIGTERM or Stop. Raises PipemaxError when it cannot work. `index` is 0."""
    config = load_config(run_dir)
    num_stages = config.pipeline_parallel_size
    with contextlib.ExitStack() as stack:
        pool = HostPool(config.held_host_bytes, 0.0 if config.cuda is None else PATIENCE_S)
        stack.callback(pool.close)
        engine, gpus = _open_engine(config, pool)
        stack.callback(engine.close)
        core = KvCore(
            num_stages,
            config.kv_offloading_bytes,
            piece_bytes(config),
            DEPTH if config.cuda is None else CUDA_DEPTH,
            orders_computing=engine.orders_computing,
        )
        shell = Shell(run_dir, num_stages, core, engine, pool, secrets.token_hex(8), gpus)
        stack.callback(shell.close)
        on_stop_signals(shell.stop)
        shell.run()


def _open_engine(config: EngineConfig, pool: HostPool) -> tuple[CopyEngine, GpuHost | None]:
    if config.cuda is None:
        bandwidth = config.emulate_link_bandwidth_bytes_s
        return CpuEngine(config.pipeline_parallel_size, bandwidth, config.held_block_bytes), None
    layout = HostLayout.of(config)
    parts = tuple(map(layout.part, range(config.pipeline_parallel_size)))
    if config.cuda.kv_copies == "stage":
        return OrderEngine(layout, pool.handle), GpuHost(parts)
    from pipemax.kv_daemon.cuda_engine import CudaEngine

    cuda_engine = CudaEngine(layout, config.cuda.gpus, pool)
    return cuda_engine, GpuHost(
        parts, cuda_engine.pci_bus_ids, cuda_engine.pin, cuda_engine.context_bytes
    )
