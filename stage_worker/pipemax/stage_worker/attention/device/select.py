"""Chooses how a stage on a device attends."""

import importlib.util
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

log = logging.getLogger(__name__)


def open_attention(
    geometry: BlockGeometry, num_heads: int, name: BackendName, device: torch.device
) -> DevicePagedAttention:
    """Attention of a stage whose steps lie on `device`. `num_heads`: query heads.

    `auto` is FlashInfer where it is installed and can run this model, else Triton where it is
    installed, else plain torch. Raises ConfigError for a backend that is asked for by name and is
    not installed.
    """
    backend = _open(geometry, num_heads, name, device)
    log.info("attention: %s", backend.name)
    return DevicePagedAttention(geometry, torch_dtype(geometry.dtype), num_heads, backend)


def _open(
    geometry: BlockGeometry, num_heads: int, name: BackendName, device: torch.device
) -> AttentionBackend:
    if name == "reference":
        return ReferenceBackend()
    if name == "flashinfer" or (name == "auto" and _installed("flashinfer", device)):
        raise ConfigError("--attention-backend flashinfer is not implemented yet")
    if name == "triton" or _installed("triton", device):
        return _triton(device)
    if device.type != "cpu":
        log.warning("attention: plain torch, which is slow: neither flashinfer nor triton is here")
    return ReferenceBackend()


def _installed(package: str, device: torch.device) -> bool:
    """Whether the package is here and has kernels for the device."""
    return device.type == "cuda" and importlib.util.find_spec(package) is not None


def _triton(device: torch.device) -> AttentionBackend:
    try:
        from pipemax.stage_worker.attention.device.triton_backend import TritonBackend
    except ImportError as error:
        raise ConfigError(
            f"--attention-backend triton: {error}; it comes with torch for CUDA on Linux"
        ) from error
    return TritonBackend(_multiprocessors(device))


def _multiprocessors(device: torch.device) -> int:
    """1 where there is no GPU: in Triton's interpreter."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
