"""Which models PipeMax runs, and what it refuses. Imports neither torch nor transformers, so that
the launcher can say no before any process starts.

A family is in the table because a test shows PipeMax's greedy tokens equal to those of
`transformers.generate` on a small random model of that family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pipemax.proto.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a mixture-of-experts checkpoint names what transformers 5 keeps as two fused tensors.

    Module `{prefix}gate_up_proj` `[experts, 2·inner, hidden]` is `gate` over `up`, stacked over
    experts; `{prefix}down_proj` `[experts, hidden, inner]` is `down`, stacked. The templates give
    the checkpoint's names relative to the layer, with `{expert}` in place of the index.
    """

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """One supported architecture."""

    name: str
    """Short name, as in tests and messages."""
    architecture: str
    """transformers' class, the first entry of `architectures` in config.json."""
    model_type: str
    defaults: Mapping[str, int | None]
    """What transformers' configuration class assumes for a key that config.json leaves out."""
    reads_head_dim: bool = True
    """False: the head size is always hidden_size / num_attention_heads."""
    rope_types: frozenset[str] = frozenset({"default", "linear", "llama3", "yarn"})
    """Rotary scalings whose frequencies are the same at every length."""
    renames: tuple[tuple[str, str], ...] = ()
    """(in the module, in the checkpoint): parts of tensor names that differ."""
    experts: ExpertNames | None = None
    embedding: str = "embed_tokens"
    """Attributes of transformers' base model, and of its layers."""
    norm: str = "norm"
    attention: str = "self_attn"
    embedding_multiplier: str | None = None
    """Attribute by which the base model scales its input: once, on the first stage."""
    norm_identity: float = 1.0
    """Weight at which a norm scales by one. Gemma's norms add one to theirs."""
    fused: bool = False
    """Its layers are Llama's, which `fused.FusedLayers` computes."""

    def can_fuse(self, activation: str | None) -> bool:
        """Whether FusedLayers computes them with this activation, config.json's `hidden_act`."""
        return self.fused and activation == "silu"


def _defaults(
    max_position_embeddings: int,
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
) -> dict[str, int | None]:
    return {
        "max_position_embeddings": max_position_embeddings,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
    }


_QWEN_EXPERTS = ExpertNames(
    gate="mlp.experts.{expert}.gate_proj.weight",
    up="mlp.experts.{expert}.up_proj.weight",
    down="mlp.experts.{expert}.down_proj.weight",
)
_MIXTRAL_EXPERTS = ExpertNames(
    gate="block_sparse_moe.experts.{expert}.w1.weight",
    up="block_sparse_moe.experts.{expert}.w3.weight",
    down="block_sparse_moe.experts.{expert}.w2.weight",
)

FAMILIES: Final[tuple[Family, ...]] = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        _defaults(2048, 32000, 4096, 32, 32),
        fused=True,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        "mistral",
        _defaults(131072, 32000, 4096, 32, 32, 8),
        fused=True,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        _defaults(32768, 151936, 4096, 32, 32, 32),
        fused=True,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        _defaults(32768, 151936, 4096, 32, 32, 32, 128),
        fused=True,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        _defaults(8192, 256000, 2304, 26, 8, 4, 256),
        norm_identity=0.0,
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        _defaults(131072, 262208, 2304, 26, 8, 4, 256),
        norm_identity=0.0,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        _defaults(4096, 32064, 3072, 32, 32),
        rope_types=frozenset({"default"}),
    ),
    Family("olmo2", "Olmo2ForCausalLM", "olmo2", _defaults(2048, 50304, 4096, 32, 32)),
    Family(
        "granite",
        "GraniteForCausalLM",
        "granite",
        _defaults(2048, 32000, 4096, 32, 32),
        embedding_multiplier="embedding_multiplier",
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _defaults(2048, 50432, 6144, 44, 64),
        reads_head_dim=False,
        renames=(("lm_head.", "embed_out."),),
        embedding="embed_in",
        norm="final_layer_norm",
        attention="attention",
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        "mixtral",
        _defaults(131072, 32000, 4096, 32, 32, 8),
        renames=((".mlp.", ".block_sparse_moe."),),
        experts=_MIXTRAL_EXPERTS,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        _defaults(32768, 151936, 2048, 24, 32, 4),
        experts=_QWEN_EXPERTS,
    ),
)
_BY_ARCHITECTURE: Final = {family.architecture: family for family in FAMILIES}
SUPPORTED_ARCHITECTURES: Final = tuple(_BY_ARCHITECTURE)


@dataclass(frozen=True, slots=True)
class _RefusedSetting:
    key: str
    reason: str
    harmless: tuple[Any, ...] = field(default=(None, False))


_REFUSED_SETTINGS: Final = (
    _RefusedSetting(
        "quantization_config",
        "quantised weights are not supported; use the unquantised checkpoint",
        (None, {}),
    ),
    _RefusedSetting("use_bidirectional_attention", "only causal attention is supported"),
    _RefusedSetting("is_causal", "only causal attention is supported", (None, True)),
    _RefusedSetting("is_encoder_decoder", "only decoders are supported"),
    _RefusedSetting("add_cross_attention", "only decoders are supported"),
    _RefusedSetting(
        "per_layer_config", "layers that differ in configuration are not supported", (None, {})
    ),
)


def supported_family(config: Mapping[str, Any]) -> Family:
    """The family of a decoded config.json.

    Raises UnsupportedModelError, naming architecture, reason and the supported list, for an unknown
    architecture and for settings that PipeMax does not compute correctly.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UnsupportedModelError(
            f"config.json names no architecture (`architectures` is {names!r}); {_supported()}"
        )
    family = _BY_ARCHITECTURE.get(names[0])
    if family is None:
        raise UnsupportedModelError(
            f"architecture {names[0]} is not supported: no test shows that PipeMax runs it "
            f"correctly; {_supported()}"
        )
    if config.get("model_type") != family.model_type:
        raise UnsupportedModelError(
            f"architecture {family.architecture} with model_type {config.get('model_type')!r} is "
            f"not supported: it should be {family.model_type!r}; {_supported()}"
        )
    for setting in _REFUSED_SETTINGS:
        value = config.get(setting.key)
        if value not in setting.harmless:
            raise UnsupportedModelError(
                f"{family.architecture} with `{setting.key}` is refused: {setting.reason}; "
                f"{_supported()}"
            )
    _check_rope(family, config)
    return family


def _check_rope(family: Family, config: Mapping[str, Any]) -> None:
    """Refuses rotary scalings whose frequencies depend on the length of the sequence: requests of
    different lengths share a step here, and earlier keys stay rotated as they were."""
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if not isinstance(value, Mapping):
            continue
        nested = [part for part in value.values() if isinstance(part, Mapping)]
        for part in nested or [value]:
            rope_type = part.get("rope_type", part.get("type", "default"))
            if rope_type not in family.rope_types:
                raise UnsupportedModelError(
                    f"{family.architecture} with rotary scaling {rope_type!r} is refused: only "
                    f"{', '.join(sorted(family.rope_types))} keep the same frequencies at every "
                    f"length; {_supported()}"
                )


def _supported() -> str:
    return f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
