"""What every engine that runs a real model says of it, whatever the device."""

from pipemax.proto.config import EngineConfig
from pipemax.stage_worker.channels.logits import LogitsPlace, LogitsShape
from pipemax.stage_worker.channels.ring import RingShape
from pipemax.stage_worker.dtypes import dtype_name
from pipemax.stage_worker.kv_end import KvEnd
from pipemax.stage_worker.model.stage_model import StageModel


class ModelEngine:
    """The part of StageEngine that follows from the model. Subclasses set the fields."""

    _config: EngineConfig
    _model: StageModel
    _kv: KvEnd
    logits_place: LogitsPlace | None = None

    @property
    def layers(self) -> tuple[int, int]:
        return self._model.layers

    @property
    def weights_bytes(self) -> int:
        return self._model.weights_bytes

    @property
    def block_bytes(self) -> int:
        return self._model.geometry.block_bytes

    @property
    def kv(self) -> KvEnd:
        return self._kv

    @property
    def ring_shape(self) -> RingShape:
        return RingShape(
            num_slots=self._config.num_slots,
            max_rows=self._config.max_num_batched_tokens,
            hidden_size=self._model.hidden_size,
            dtype=dtype_name(self._model.dtype),
        )

    @property
    def _logits_shape(self) -> LogitsShape | None:
        """Of the ring for samplers; None on a stage that has none. No step has more rows of logits
        than it may have requests."""
        if not (self._config.sampler_workers and self._model.is_last):
            return None
        max_rows = min(self._config.max_num_seqs, self._config.max_num_batched_tokens)
        return LogitsShape(self._config.num_slots, max_rows, self._model.vocab_size)
