"""What a model is made of, without its weights: which layers are alike, and how large each part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pipemax.proto.geometry import DTYPE_BYTES, Dtype
from pipemax.stage_worker.model.families import Family, supported_family
from pipemax.stage_worker.model.inspect import read_config
from pipemax.stage_worker.model.load import build_on_meta


@dataclass(frozen=True, slots=True)
class ModelParts:
    kinds: tuple[int, ...]
    """By layer; layers of one kind are built and attend alike."""
    layer_bytes: tuple[int, ...]
    """Weights, by layer."""
    embedding_bytes: int
    head_bytes: int
    """Final norm and head; of tied embeddings a copy, as on a stage that has no other."""


def model_parts(model_dir: Path, dtype: Dtype) -> ModelParts:
    """Raises what `load_stage_model` raises for a folder or a model it cannot use."""
    family = supported_family(read_config(model_dir))
    model = build_on_meta(model_dir, family)
    base = model.base_model
    signatures = [_signature(layer, family) for layer in base.layers]
    known = list(dict.fromkeys(signatures))
    element = DTYPE_BYTES[dtype]
    return ModelParts(
        kinds=tuple(known.index(signature) for signature in signatures),
        layer_bytes=tuple(element * _parameters(layer) for layer in base.layers),
        embedding_bytes=element * _parameters(getattr(base, family.embedding)),
        head_bytes=element * (_parameters(getattr(base, family.norm)) + _parameters(model.lm_head)),
    )


def _signature(layer: nn.Module, family: Family) -> Any:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in layer.named_parameters())
    return shapes, getattr(getattr(layer, family.attention), "sliding_window", None)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
