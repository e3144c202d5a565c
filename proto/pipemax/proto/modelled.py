"""A GPU that is not at hand and a model on it: what the modelled device and the simulator go by."""

from dataclasses import dataclass
from typing import Final

import msgspec

KV_TOKEN_BYTES: Final = 16
"""What a modelled stage really keeps for a token, in place of its keys and values: enough to tell
which token, at which position, after which context."""

KV_ELEMENT_BYTES: Final = 2.0
"""bfloat16"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the performance model needs to know of a GPU. Bytes, seconds and FLOP, no prefixes."""

    name: str
    memory_bytes: float
    hbm_bytes_s: float
    flop_s: float
    """Dense bfloat16."""
    link_bytes_s: float
    """Host link, effective, in each direction."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder as the performance model sees it."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    parameters: float
    """All, as a number (not billions)."""
    active_parameters: float
    """Used by one token; all of them unless the model is a mixture of experts."""
    num_experts: int = 1
    experts_per_token: int = 1

    @property
    def expert_parameters(self) -> float:
        """Parameters of one expert on all layers; 0 without experts. From
        parameters = shared + E·x and active = shared + k·x."""
        if self.num_experts == self.experts_per_token:
            return 0.0
        spare = self.num_experts - self.experts_per_token
        return (self.parameters - self.active_parameters) / spare

    def kv_token_bytes(self, num_layers: int, element_bytes: float) -> float:
        """KV bytes of one token on `num_layers` layers."""
        return 2 * num_layers * self.num_kv_heads * self.head_dim * element_bytes


class ModelledDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`--device modelled:<gpu>`: stages wait as long as this GPU would compute. Taken from the
    catalogue once, by the launcher, so that all processes mean the same GPU and model."""

    gpu: Gpu
    shape: ModelShape
    vocab_size: int
    """Made-up tokens are below this."""
    time_scale: float = 1.0
    """Seconds that a modelled second takes."""

    def block_bytes(self, num_layers: int, block_size: int) -> int:
        """What a KV block of `num_layers` layers takes on the GPU and on its link."""
        return round(self.shape.kv_token_bytes(num_layers, KV_ELEMENT_BYTES) * block_size)
