"""Random weights in place of a checkpoint (`--load-format dummy`): a model of any size without a
download, for measurements and for trying a machine.

They are drawn as transformers initialises a model it is about to train (norms at one, or at what
changes nothing; biases at zero; all else normal with the configuration's `initializer_range`), so
that activations stay finite in 16 bits. What a tensor gets depends on its name alone: a model is
the same however its layers are split. A GPU draws other numbers than a CPU.
"""

import zlib
from typing import Any, Final

import torch

from pipemax.stage_worker.model.families import Family

HEAD: Final = "lm_head.weight"
_STANDARD_DEVIATION: Final = 0.02
"""transformers' own default, for a family whose configuration does not say."""


class DummyWeights:
    """Draws the tensors that a Checkpoint would read."""

    def __init__(self, family: Family, config: Any) -> None:
        """`config`: transformers', of the model."""
        self._family = family
        self._std: float = getattr(config, "initializer_range", _STANDARD_DEVIATION)
        self._missing = HEAD if config.tie_word_embeddings else None
        self.names_read: tuple[str, ...] = ()
        """None: there is no checkpoint."""

    def has(self, name: str) -> bool:
        """All but the head of a model whose head is its embedding."""
        return name != self._missing

    def read(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The tensor a module calls `name`, in memory of `device`."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("bias"):
            return tensor.zero_()
        if len(shape) == 1:
            return tensor.fill_(self._family.norm_identity)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return tensor.normal_(0.0, self._std, generator=generator)
