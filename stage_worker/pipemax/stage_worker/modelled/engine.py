"""The stage that models its GPU. No torch, no weights, no tensors."""

from msgspec.structs import replace

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages.control import SweepSample
from pipemax.stage_worker.channels.ring import RingMemory, RingShape
from pipemax.stage_worker.engine import WorkLoop, pool_blocks
from pipemax.stage_worker.executor import Executor, Links
from pipemax.stage_worker.kv_end import KvEnd, MappedPool
from pipemax.stage_worker.modelled.kv import ModelledPool
from pipemax.stage_worker.modelled.loads import modelled_sweep
from pipemax.stage_worker.modelled.pace import Pace
from pipemax.stage_worker.modelled.ring import ROW_NUMBERS, ModelledRingMemory
from pipemax.stage_worker.modelled.roofline import StageModel
from pipemax.stage_worker.modelled.step import ModelledStep
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue
from pipemax.stage_worker.sweep import SweepLimits


class ModelledEngine:
    """StageEngine for stage `stage` of `config.modelled`."""

    def __init__(self, config: EngineConfig, stage: int) -> None:
        if config.modelled is None:
            raise ConfigError("the configuration does not say which GPU to model")
        self._config = config
        self._device = config.modelled
        self._stage = stage
        first = sum(config.layer_split[:stage])
        self.layers = (first, first + config.layer_split[stage])
        self._model = StageModel(self._device.gpu, self._device.shape, config.layer_split[stage])
        self.block_bytes = self._device.block_bytes(config.layer_split[stage], config.block_size)
        self.num_blocks = pool_blocks(self.block_bytes, config.block_size, config.pool_bytes, stage)
        self._pool = ModelledPool(self.num_blocks, config.block_size, self.layers)
        self._kv = MappedPool(self._pool.memory.handle)
        self._ring_memory = ModelledRingMemory()
        self.logits_place = None  # tokens are made up: there is nothing to sample from

    @property
    def weights_bytes(self) -> int:
        """As the GPU would hold; none are read."""
        return round(self._model.weights_bytes)

    @property
    def kv(self) -> KvEnd:
        return self._kv

    @property
    def ring_shape(self) -> RingShape:
        return RingShape(
            num_slots=self._config.num_slots,
            max_rows=self._config.max_num_batched_tokens,
            hidden_size=ROW_NUMBERS,
            dtype="uint64",
        )

    @property
    def ring_memory(self) -> RingMemory:
        return self._ring_memory

    def sweep(self, limit_s: float) -> tuple[SweepSample, ...]:
        """What it would measure; takes no time."""
        if limit_s <= 0:
            return ()
        limits = SweepLimits.of(self._config, self.num_blocks)
        scale = self._device.time_scale
        return tuple(
            replace(sample, compute_s=scale * sample.compute_s)
            for sample in modelled_sweep(self._model, limits)
        )

    def work_loop(self, queue: StepQueue, links: Links, clock: StateClock) -> WorkLoop:
        work = ModelledStep(
            self._stage,
            self._model,
            self._pool,
            Pace(clock),
            is_last=self._stage == self._config.pipeline_parallel_size - 1,
            vocab_size=self._device.vocab_size,
            time_scale=self._device.time_scale,
        )
        return Executor(queue, work, links, clock)

    def close(self) -> None:
        self._pool.close()
