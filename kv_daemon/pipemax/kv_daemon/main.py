"""The KV daemon process."""

import contextlib
import secrets
from pathlib import Path

from pipemax.kv_daemon.core import PIECE_BYTES, KvCore
from pipemax.kv_daemon.cpu_engine import CpuEngine
from pipemax.kv_daemon.host_pool import HostPool
from pipemax.kv_daemon.shell import Shell
from pipemax.proto.config import EngineConfig, load_config
from pipemax.proto.process import on_stop_signals

PIECE_S = 0.02
"""On an imitated link, which may be slow, a piece also takes no longer than this."""
MODELLED_PIECE_S = 0.01
"""On a modelled link a piece takes this long: its few real bytes cost nothing, but two threads
switch for every piece, and a machine may run as many links as a server with eight GPUs."""


def piece_bytes(config: EngineConfig) -> int:
    """Most bytes of one copy: large enough to be fast, small enough to let urgent work pass."""
    bandwidth = config.emulate_link_bandwidth_bytes_s
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
        pool = HostPool(config.held_host_bytes)
        stack.callback(pool.close)
        engine = CpuEngine(
            num_stages, config.emulate_link_bandwidth_bytes_s, config.held_block_bytes
        )
        stack.callback(engine.close)
        core = KvCore(num_stages, config.kv_offloading_bytes, piece_bytes(config))
        shell = Shell(run_dir, num_stages, core, engine, pool, secrets.token_hex(8))
        stack.callback(shell.close)
        on_stop_signals(shell.stop)
        shell.run()
