"""Chooses how a stage on a device attends."""

import logging
from typing import Literal, TypeAlias

import torch

from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import BlockGeometry
from pipemax.stage_worker.attention.device.base import AttentionBackend
from pipemax.stage_worker.attention.device.paged import DevicePagedAttention
from pipemax.stage_worker.attention.device.reference import ReferenceBackend
from pipemax.stage_worker.dtypes import torch_dtype

BackendName: TypeAlias = Literal["auto", "flashinfer", "triton", "reference"]

_LOG = logging.getLogger(__name__)


def open_attention(
    geometry: BlockGeometry, num_heads: int, name: BackendName, device: torch.device
) -> DevicePagedAttention:
    """Attention of a stage whose steps lie on `device`. `num_heads`: query heads.

    Raises ConfigError for a backend that is asked for by name and cannot be had.
    """
    backend = _open_backend(name)
    _LOG.info("attention backend: %s", backend.name)
    return DevicePagedAttention(geometry, torch_dtype(geometry.dtype), num_heads, backend)


def _open_backend(name: BackendName) -> AttentionBackend:
    if name in ("auto", "reference"):
        return ReferenceBackend()
    raise ConfigError(f"--attention-backend {name} is not implemented yet; use reference")
