"""Reads single tensors of a safetensors checkpoint, under the names transformers' modules use."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

from pipemax.proto.errors import ModelError
from pipemax.stage_worker.model.families import Family
from pipemax.stage_worker.model.inspect import checkpoint_files
from pipemax.stage_worker.model.safetensors_header import read_header


class Checkpoint:
    """The tensors of a model folder. Only what is asked for is read.

    Raises ModelError on opening when a file is missing or damaged.
    """

    def __init__(self, model_dir: Path, family: Family) -> None:
        self._family = family
        self._dir = model_dir
        self._files = {
            name: path for path in checkpoint_files(model_dir) for name in read_header(path)
        }
        self._open: dict[Path, Any] = {}
        self.names_read: list[str] = []
        """Tensors read so far, under the checkpoint's names."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def has(self, name: str) -> bool:
        """Whether a tensor of this module name can be read as it is."""
        return name in self._files or self._renamed(name) in self._files

    def read(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The tensor a module calls `name`, in memory of its own on `device`. The file is mapped:
        what goes to a GPU never has a copy in host memory.

        Raises ModelError, naming tensor and file, when it is missing or of another shape.
        """
        if not self.has(name):
            fused = self._fused_experts(name, shape, dtype, device)
            if fused is not None:
                return fused
        return self._read(name if name in self._files else self._renamed(name), shape).to(
            device, dtype, copy=True
        )

    def _fused_experts(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor | None:
        """`[experts, ...]` from one tensor per expert, or None when `name` is no such tensor."""
        names = self._family.experts
        prefix, _, kind = name.rpartition("mlp.experts.")
        if names is None or kind not in ("gate_up_proj", "down_proj"):
            return None
        parts = (names.gate, names.up) if kind == "gate_up_proj" else (names.down,)
        out = torch.empty(shape, dtype=dtype, device=device)
        rows = shape[1] // len(parts)
        for expert in range(shape[0]):
            for index, part in enumerate(parts):
                source = prefix + part.format(expert=expert)
                target = out[expert, index * rows : (index + 1) * rows]
                target.copy_(self._read(source, target.shape))
        return out

    def _renamed(self, name: str) -> str:
        for in_module, in_checkpoint in self._family.renames:
            name = name.replace(in_module, in_checkpoint)
        return name

    def _read(self, name: str, shape: torch.Size) -> torch.Tensor:
        path = self._files.get(name)
        if path is None:
            raise ModelError(
                f"{self._dir} has no tensor {name}; its weights do not belong to its config.json"
            )
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        if tensor.shape != shape:
            raise ModelError(
                f"{path}: tensor {name} is {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(f"{path}: tensor {name} is {tensor.dtype}, not a plain float")
        self.names_read.append(name)
        return tensor
