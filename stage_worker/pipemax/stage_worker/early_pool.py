"""What a CPU stage needs no torch for, done while it imports torch: its KV pool is made resident,
and the kernel is asked to read the weights from disk.

Importing keeps one core busy for seconds and waits for nothing, so both run in a thread beside it.
Imports no torch itself.
"""

import os
import threading
from pathlib import Path

from pipemax.proto.config import EngineConfig
from pipemax.proto.memory import SharedMemory
from pipemax.stage_worker.engine import pool_blocks
from pipemax.stage_worker.model.inspect import checkpoint_files, inspect_model


class EarlyPool:
    """The memory of stage `stage`'s KV pool. Nothing is computed from the model but its shape, so a
    folder that cannot be used is refused before any import.

    Raises ModelError and UnsupportedModelError for the folder, ConfigError for a pool of no block.
    """

    def __init__(self, config: EngineConfig, stage: int) -> None:
        model_dir = Path(config.model)
        info = inspect_model(model_dir, config.load_format)
        self.geometry = info.kv_geometry(config.layer_split[stage], config.block_size, config.dtype)
        block_bytes = self.geometry.block_bytes
        self.num_blocks = pool_blocks(block_bytes, config.block_size, config.pool_bytes, stage)
        self._memory = SharedMemory.create("pipemax-kv-pool", self.num_blocks * block_bytes)
        files = checkpoint_files(model_dir) if config.load_format == "auto" else ()
        self._thread = threading.Thread(
            target=self._fetch, args=(files,), name="early-pool", daemon=True
        )
        self._thread.start()

    def _fetch(self, files: tuple[Path, ...]) -> None:
        for path in files:
            _read_ahead(path)
        self._memory.prefault()

    def take(self) -> SharedMemory:
        """The pool's memory, resident. The caller's to close."""
        self._thread.join()
        return self._memory


def _read_ahead(path: Path) -> None:
    """Starts to read a file into the page cache. What is there already costs nothing; that memory
    is short, the kernel knows better than we."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)
