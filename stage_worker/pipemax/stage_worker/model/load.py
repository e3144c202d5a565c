"""Builds one stage's part of a model: transformers' own modules for its layers, or a skeleton of
them where they only hold weights for fused ones; its tensors only.

The model is built on the meta device, where it costs no memory. Layers of other stages are replaced
by a module that passes its input on, rather than left out, because some models choose a layer's
type by its index. Embedding, final norm and head stay where they are used.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias

import torch
from torch import nn

from pipemax.proto.errors import InvariantError, ModelError
from pipemax.proto.geometry import BlockGeometry
from pipemax.stage_worker.attention import paged
from pipemax.stage_worker.attention.interface import StageAttention
from pipemax.stage_worker.dtypes import torch_dtype
from pipemax.stage_worker.model.checkpoint import Checkpoint
from pipemax.stage_worker.model.dummy import HEAD, DummyWeights
from pipemax.stage_worker.model.families import Family, supported_family
from pipemax.stage_worker.model.fused import FusedLayers
from pipemax.stage_worker.model.inspect import inspect_model, read_config
from pipemax.stage_worker.model.packed import can_pack, pack_modules
from pipemax.stage_worker.model.skeleton import build_skeleton, read_shape
from pipemax.stage_worker.model.stage_model import StageModel

__all__ = ["StageModel", "load_stage_model"]

CPU: Final = torch.device("cpu")
AttentionFactory: TypeAlias = Callable[[BlockGeometry, int], StageAttention]
"""Makes a stage's attention from its geometry and its number of query heads."""


class WeightSource(Protocol):
    """A Checkpoint, or what stands for one."""

    def has(self, name: str) -> bool: ...

    def read(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor: ...


class PassThrough(nn.Module):
    """In the place of a layer that another stage runs."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def load_stage_model(
    model_dir: Path,
    *,
    stage: int,
    layer_split: tuple[int, ...],
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    block_size: int,
    backend: paged.Backend = "kernel",
    device: torch.device = CPU,
    open_attention: AttentionFactory | None = None,
    load_format: Literal["auto", "dummy"] = "auto",
    fused_layers: bool = True,
) -> StageModel:
    """Stage `stage` of a model whose layers are split as `layer_split`, on `device`. Without
    `open_attention` steps are prepared in host memory, for CPU kernels (`backend`). With
    `load_format` `dummy` the folder needs no more than config.json, and weights are random.
    `fused_layers`: on the CPU, layers of a family that FusedLayers knows are computed by it, and
    other families' matrices are packed.

    Raises ModelError for a folder that cannot be used and UnsupportedModelError for a model PipeMax
    does not run.
    """
    info = inspect_model(model_dir, load_format)
    config = read_config(model_dir)
    family = supported_family(config)
    if sum(layer_split) != info.num_layers or not 0 <= stage < len(layer_split):
        raise InvariantError(
            f"stage {stage} of layers split {layer_split}, the model has {info.num_layers}"
        )
    first = sum(layer_split[:stage])
    layers = (first, first + layer_split[stage])
    is_first, is_last = stage == 0, stage == len(layer_split) - 1
    geometry = info.kv_geometry(layer_split[stage], block_size, dtype)
    fusable = fused_layers and device == CPU and open_attention is None
    shape = read_shape(family, config) if fusable else None
    model = build_on_meta(model_dir, family) if shape is None else build_skeleton(shape)
    attention: StageAttention
    if open_attention is None:
        attention = paged.PagedAttention(geometry, torch_dtype(geometry.dtype), backend)
    else:
        attention = open_attention(geometry, model.config.num_attention_heads)
    try:
        _trim(model, family, layers, is_first=is_first, is_last=is_last)
        _attach(model, family, layers, attention)
        with contextlib.ExitStack() as stack:
            source: Checkpoint | DummyWeights
            if load_format == "dummy":
                source = DummyWeights(family, model.config)
            else:
                source = stack.enter_context(Checkpoint(model_dir, family))
            _load_weights(model, family, source, attention.dtype, device)
        _compute_buffers(model, family, device)
        if not is_first and shape is None:
            probe = torch.linspace(-1.0, 1.0, 2 * info.hidden_size)
            _check_input_passes_unchanged(model, family, probe.to(device, attention.dtype))
    except AttributeError as error:
        raise ModelError(
            f"{family.architecture}: this transformers builds it in a way PipeMax does not know "
            f"({error}); install the version in ops/constraints-cpu.txt"
        ) from error
    rebuild: Callable[[], FusedLayers | None] | None = None
    if fusable and isinstance(attention, paged.PagedAttention):
        if family.can_fuse(getattr(model.config, "hidden_act", None)):
            rebuild = functools.partial(FusedLayers, model, family, layers, attention)
        elif can_pack(attention.dtype):
            rebuild = functools.partial(pack_modules, model)
    return StageModel(model, attention, info, layers, tuple(source.names_read), rebuild)


def build_on_meta(model_dir: Path, family: Family) -> Any:
    """The whole model on the meta device, with our attention. Never code from the model folder."""
    from transformers import AutoModelForCausalLM  # takes seconds, and not every model needs it
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    paged.register()
    try:
        config = CONFIG_MAPPING[family.model_type].from_pretrained(model_dir)
        config.return_dict = True
        config.output_router_logits = False
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=paged.IMPLEMENTATION
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"transformers cannot build {family.architecture} from {model_dir}: {reason}"
        ) from error
    return model.eval().requires_grad_(False)


def _trim(
    model: Any, family: Family, layers: tuple[int, int], *, is_first: bool, is_last: bool
) -> None:
    """Leaves of the model what this stage computes."""
    base = model.base_model
    for index in range(len(base.layers)):
        if not layers[0] <= index < layers[1]:
            base.layers[index] = PassThrough()
    if not is_first:
        _replace(base, family.embedding, None)
        if family.embedding_multiplier is not None:
            _replace(base, family.embedding_multiplier, 1.0)
    if not is_last:
        _replace(base, family.norm, nn.Identity())
        _replace(model, "lm_head", None)


def _replace(module: nn.Module, name: str, value: Any) -> None:
    getattr(module, name)  # AttributeError when transformers calls it something else
    setattr(module, name, value)


def _attach(model: Any, family: Family, layers: tuple[int, int], attention: StageAttention) -> None:
    """Hangs the paged cache on this stage's attention modules."""
    for index in range(*layers):
        module = getattr(model.base_model.layers[index], family.attention)
        if module.layer_idx != index:
            raise InvariantError(f"layer {index} calls itself {module.layer_idx}")
        module.paged_layer = paged.PagedLayer(attention, index - layers[0])


def _load_weights(
    model: Any, family: Family, source: WeightSource, dtype: torch.dtype, device: torch.device
) -> None:
    """Replaces every parameter of the trimmed model by the source's, one after the other.

    With tied embeddings the head is the embedding, whichever of the two the checkpoint holds; one
    that holds both is taken at its word, as transformers does.
    """
    embedding = f"{model.base_model_prefix}.{family.embedding}.weight"
    tied = {embedding: HEAD, HEAD: embedding} if model.config.tie_word_embeddings else {}
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        origin = tied[name] if name in tied and not source.has(name) else name
        if origin in state:
            state[name] = state[origin]
        else:
            tensor = source.read(origin, parameter.shape, dtype, device)
            # As `load_state_dict` would make one parameter of each name for the same tensor.
            state[name] = nn.Parameter(tensor, requires_grad=False)
    model.load_state_dict(state, strict=True, assign=True)


def _compute_buffers(model: Any, family: Family, device: torch.device) -> None:
    """Computes what no checkpoint holds: rotary frequencies, which stay float32 whatever the
    weights are, and the scale of a scaled embedding. On the CPU, so that every device has the same
    numbers."""
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)
    embedding = getattr(base, family.embedding)
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != device.type:
            raise AttributeError(f"{name} is on {tensor.device}")


@torch.inference_mode()
def _check_input_passes_unchanged(model: Any, family: Family, values: torch.Tensor) -> None:
    """With its layers and norm taken out, the base model must give back what a later stage feeds
    it. Guards against a transformers whose forward scales its input where we do not know of it."""
    base = model.base_model
    layers, norm = base.layers, getattr(base, family.norm)
    probe = values.view(1, 2, -1)
    positions = torch.arange(2, device=values.device)[None]
    try:
        base.layers = nn.ModuleList(PassThrough() for _ in layers)
        setattr(base, family.norm, nn.Identity())
        out = base(inputs_embeds=probe, position_ids=positions, use_cache=False)
    finally:
        base.layers = layers
        setattr(base, family.norm, norm)
    if not torch.equal(out.last_hidden_state, probe):
        raise AttributeError("it changes the input of later stages")
