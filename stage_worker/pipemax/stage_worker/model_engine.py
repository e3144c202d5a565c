"""What every engine that runs a real model says of it, whatever the device."""

from pipemax.proto.config import EngineConfig
from pipemax.stage_worker.channels.ring import RingShape
from pipemax.stage_worker.dtypes import dtype_name
from pipemax.stage_worker.kv_end import KvEnd
from pipemax.stage_worker.model.stage_model import StageModel


class ModelEngine:
    """The part of StageEngine that follows from the model. Subclasses set the three fields."""

    _config: EngineConfig
    _model: StageModel
    _kv: KvEnd

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
