"""Whether the device pools are large enough to work with."""

from pipemax.coordinator.events import Resumed
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import blocks_for
from pipemax.proto.sizes import format_size


def check_capacity(config: EngineConfig, resumed: Resumed) -> None:
    """Raises ConfigError when the device pools, whose size only the stages know, cannot hold one
    request of the greatest length."""
    needed = blocks_for(config.max_model_len, config.block_size) + 1
    if resumed.num_device_blocks >= needed:
        return
    if config.cuda is not None and config.kv_cache_memory_bytes is None:
        more = f"--gpu-memory-utilization above {config.cuda.gpu_memory_utilization:g}"
    else:
        more = f"--kv-cache-memory-bytes to {format_size(needed * max(resumed.block_bytes))}"
    fitting = max(0, resumed.num_device_blocks - 1) * config.block_size
    raise ConfigError(
        f"the device KV pool holds {resumed.num_device_blocks} blocks, one request of "
        f"--max-model-len {config.max_model_len} needs {needed}: raise {more} or lower "
        f"--max-model-len to {fitting}"
    )
