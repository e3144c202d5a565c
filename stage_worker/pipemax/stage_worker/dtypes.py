"""The names of dtypes on the wire and in geometry, and torch's."""

from typing import Final

import torch

from pipemax.proto.geometry import Dtype
from pipemax.stage_worker.channels.ring import RingDtype

_BY_NAME: Final[dict[Dtype, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_BY_TORCH: Final = {dtype: name for name, dtype in _BY_NAME.items()}


def torch_dtype(name: RingDtype) -> torch.dtype:
    return torch.uint64 if name == "uint64" else _BY_NAME[name]


def dtype_name(dtype: torch.dtype) -> Dtype:
    """Raises KeyError for a dtype in which no model is served."""
    return _BY_TORCH[dtype]
