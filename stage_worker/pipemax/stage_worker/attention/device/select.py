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
from pipemax.stage_worker.attention.probe import probe_plan
from pipemax.stage_worker.dtypes import torch_dtype

BackendName: TypeAlias = Literal["auto", "flashinfer", "triton", "reference"]

log = logging.getLogger(__name__)


def open_attention(
    geometry: BlockGeometry, num_heads: int, name: BackendName, device: torch.device
) -> DevicePagedAttention:
    """Attention of a stage whose steps lie on `device`. `num_heads`: query heads.

    `auto` is FlashInfer where it is installed, else Triton where it is installed, else plain torch.
    Where FlashInfer cannot run this model, Triton takes its place and a line in the log says why.
    Raises ConfigError for a backend that is asked for by name and is not installed.
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
        try:
            return _flashinfer(geometry, num_heads, device)
        except _UnableError as reason:
            log.warning("attention: triton in the place of flashinfer: %s", reason)
        return _triton(device)
    if name == "triton" or _installed("triton", device):
        return _triton(device)
    if device.type == "cuda":
        log.warning("attention: plain torch, which is slow: neither flashinfer nor triton is here")
    return ReferenceBackend()


def _installed(package: str, device: torch.device) -> bool:
    """Whether the package is here and has kernels for the device."""
    return device.type == "cuda" and importlib.util.find_spec(package) is not None


class _UnableError(Exception):
    """A backend cannot run this model here; says why."""


def _flashinfer(geometry: BlockGeometry, num_heads: int, device: torch.device) -> AttentionBackend:
    try:
        import flashinfer

        from pipemax.stage_worker.attention.device import flashinfer_backend
        from pipemax.stage_worker.attention.device.write import write_kv
    except ImportError as error:
        raise ConfigError(
            f"--attention-backend flashinfer: {error}; install flashinfer-python, or use triton"
        ) from error
    dtype = torch_dtype(geometry.dtype)
    obstacle = flashinfer_backend.obstacle(flashinfer, dtype, geometry.head_dim)
    if obstacle is not None:
        raise _UnableError(obstacle)

    def backend() -> AttentionBackend:
        return flashinfer_backend.FlashInferBackend(flashinfer, num_heads, device, write_kv)

    try:
        # FlashInfer compiles its kernels when it first needs them, which may fail in many ways.
        _try_out(geometry, num_heads, backend(), device)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _UnableError(f"a first step with it failed: {line}") from error
    return backend()


def _try_out(
    geometry: BlockGeometry, num_heads: int, backend: AttentionBackend, device: torch.device
) -> None:
    """Runs a decode and a prompt of two tokens over one layer of a pool of one block."""
    dtype = torch_dtype(geometry.dtype)
    attention = DevicePagedAttention(geometry, dtype, num_heads, backend)
    attention.bind_pool(torch.zeros((1, *geometry.block_shape), dtype=dtype, device=device))
    step = attention.prepare(probe_plan())
    attention.begin(step)

    def rows(heads: int) -> torch.Tensor:
        shape = (step.num_tokens, heads, geometry.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device)

    kv_heads = geometry.num_kv_heads
    attention.attend(0, rows(num_heads), rows(kv_heads), rows(kv_heads), 1.0, 0, 0.0)


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
