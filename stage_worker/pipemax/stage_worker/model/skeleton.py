"""The modules of a Llama-like model that `fused.FusedLayers` takes its weights from, made without
transformers: they hold tensors under transformers' names and compute nothing but the embedding and
the rotation.

Importing transformers' model classes takes a stage twice as long as importing torch, and 160 MB
(ops/benchmarks/LOG.md), for modules that FusedLayers empties at once. A configuration that leaves
anything to transformers' defaults, or asks for anything that is not here, is transformers' to
build: `read_shape` then says None.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from pipemax.stage_worker.model.families import Family

_NEEDED: Final = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "rms_norm_eps", "hidden_act"),
)
_UNKNOWN: Final = ("partial_rotary_factor", "rope_interleaved", "mup_base_width")
_LLAMA3: Final = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: https://arxiv.org/abs/2104.09864, scaled as Llama 3.1 does or not at
    all."""

    theta: float
    llama3: Mapping[str, float] | None = None

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """`[head_dim / 2]`, float32. Never on the meta device: arithmetic there would import
        torch's compiler."""
        pairs = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu")
        exponents = pairs.float() / head_dim
        frequencies = 1.0 / (self.theta**exponents)
        return frequencies if self.llama3 is None else _llama3(frequencies, self.llama3)


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, float]) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones kept, and those between in proportion."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi / frequencies
    kept = (original / waves - low) / (high - low)
    between = (1 - kept) * frequencies / factor + kept * frequencies
    scaled = torch.where(waves > original / low, frequencies / factor, between)
    return torch.where(waves < original / high, frequencies, scaled)


@dataclass(frozen=True, slots=True)
class Shape:
    """What `FusedLayers` and the loader ask of a configuration."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    sliding_window: int | None
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norm: bool
    rope: Rope


def read_shape(family: Family, config: Mapping[str, Any]) -> Shape | None:
    """Of a decoded config.json; None for what only transformers builds."""
    rope = _read_rope(config)
    if rope is None or not family.can_fuse(config.get("hidden_act")):
        return None
    if any(config.get(key) is None for key in _NEEDED):
        return None
    if any(config.get(key) is not None for key in _UNKNOWN) or config.get("use_sliding_window"):
        return None
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        return None
    if family.name == "mistral" and "sliding_window" not in config:
        return None
    if family.name == "qwen3" and config.get("head_dim") is None:
        return None
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    bias = bool(config.get("attention_bias"))
    return Shape(
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        rms_norm_eps=config["rms_norm_eps"],
        hidden_act=config["hidden_act"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        sliding_window=config["sliding_window"] if family.name == "mistral" else None,
        qkv_bias=family.name == "qwen2" or (bias and family.name in ("llama", "qwen3")),
        out_bias=bias and family.name in ("llama", "qwen3"),
        mlp_bias=bool(config.get("mlp_bias")) and family.name == "llama",
        head_norm=family.name == "qwen3",
        rope=rope,
    )


def _read_rope(config: Mapping[str, Any]) -> Rope | None:
    """As transformers 5 writes it (`rope_parameters`), or as before (`rope_theta`,
    `rope_scaling`); None where theta is left to a default, or the scaling is another."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new:
        return None
    scaling = new or old or {}
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(theta, int | float) or isinstance(theta, bool):
        return None
    if kind == "default" and scaling.get("partial_rotary_factor") is None:
        return Rope(float(theta))
    if kind == "llama3" and all(isinstance(scaling.get(key), int | float) for key in _LLAMA3):
        return Rope(float(theta), {key: float(scaling[key]) for key in _LLAMA3})
    return None


class Skeleton(nn.Module):
    """A model of this shape. On the meta device until its tensors are loaded."""

    base_model_prefix = "model"

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.config = shape
        self.model = _Base(shape)
        self.lm_head = _Linear(shape.hidden_size, shape.vocab_size, bias=False)

    @property
    def base_model(self) -> "_Base":
        return self.model


def build_skeleton(shape: Shape) -> Skeleton:
    """On the meta device, where it costs no memory."""
    with torch.device("meta"):
        model = Skeleton(shape)
    return model.eval().requires_grad_(False)


class _Linear(nn.Linear):
    """Not initialised: on the meta device that would import torch's compiler."""

    def reset_parameters(self) -> None:
        """Its tensors are loaded."""


class _Embedding(nn.Embedding):
    """The same."""

    def reset_parameters(self) -> None:
        """Its tensors are loaded."""


class _Base(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = _Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            _Layer(shape, index) for index in range(shape.num_hidden_layers)
        )
        self.norm = _Norm(shape.hidden_size, shape.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(shape)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens


class _Layer(nn.Module):
    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.self_attn = _Attention(shape, index)
        self.mlp = _Mlp(shape)
        self.input_layernorm = _Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = _Norm(shape.hidden_size, shape.rms_norm_eps)


class _Attention(nn.Module):
    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.scaling = shape.head_dim**-0.5
        query = shape.num_attention_heads * shape.head_dim
        kv = shape.num_key_value_heads * shape.head_dim
        self.q_proj = _Linear(shape.hidden_size, query, bias=shape.qkv_bias)
        self.k_proj = _Linear(shape.hidden_size, kv, bias=shape.qkv_bias)
        self.v_proj = _Linear(shape.hidden_size, kv, bias=shape.qkv_bias)
        self.o_proj = _Linear(query, shape.hidden_size, bias=shape.out_bias)
        if shape.head_norm:
            self.q_norm = _Norm(shape.head_dim, shape.rms_norm_eps)
            self.k_norm = _Norm(shape.head_dim, shape.rms_norm_eps)


class _Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = _Linear(hidden, inner, bias=shape.mlp_bias)
        self.up_proj = _Linear(hidden, inner, bias=shape.mlp_bias)
        self.down_proj = _Linear(inner, hidden, bias=shape.mlp_bias)


class _Norm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = epsilon


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position, `[1, T, head_dim]` each."""

    inv_freq: torch.Tensor

    def __init__(self, config: Shape) -> None:
        super().__init__()
        frequencies = config.rope.frequencies(config.head_dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(
        self, like: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In the dtype of `like`. `position_ids` `[1, T]`."""
        angles = position_ids[0, :, None].float() * self.inv_freq
        both = torch.cat((angles, angles), dim=-1)[None]
        return both.cos().to(like.dtype), both.sin().to(like.dtype)
