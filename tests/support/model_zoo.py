"""Small random models, one per supported family, and what transformers itself generates with them.

Every model has 4 layers and a vocabulary of 512 and fits a test: what matters about its family
(grouped heads, a window, soft-caps, multipliers, experts) is there and is large enough to change
the tokens when it is left out.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 512
EOS_TOKEN_ID = 2
WINDOW = 32

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_SPECIFIC: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {"num_key_value_heads": 2, "sliding_window": WINDOW},
    ),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
    "qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "sliding_attention",
            ],
        },
    ),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"num_key_value_heads": 2, "sliding_window": WINDOW},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"num_key_value_heads": 2}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}
FAMILIES: tuple[str, ...] = tuple(_SPECIFIC)


def build_model(
    family: str,
    directory: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Writes a small random model of `family` to `directory` and returns it.

    config.json, safetensors (with an index when `max_shard_size` splits them) and
    generation_config.json; no tokenizer. `overrides` change the configuration.
    """
    config_name, model_name, specific = _SPECIFIC[family]
    config = getattr(transformers, config_name)(**{**_COMMON, **specific, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).to(getattr(torch, dtype)).eval()
    _spread(model)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=EOS_TOKEN_ID, pad_token_id=0
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    """Larger weights than training starts from, and smaller embeddings beside them: otherwise
    greedy decoding repeats its last token and the outputs say nothing about attention."""
    embedding = model.get_input_embeddings()
    for name, parameter in model.named_parameters():
        if parameter is embedding.weight:
            parameter.normal_(
                0.0, 0.3 / float(getattr(embedding, "scalar_embed_scale", 1.0)) ** 1.5
            )
        elif parameter.dim() >= 2:
            parameter.normal_(0.0, 2.0 / parameter.shape[-1] ** 0.5)
        elif "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.normal_(0.0, 0.1)


@torch.inference_mode()
def reference_tokens(
    model_dir: Path,
    prompts: list[list[int]],
    max_new_tokens: list[int],
    *,
    ignore_eos: bool = False,
) -> list[list[int]]:
    """What `transformers.generate` answers greedily to each prompt alone, without the prompt;
    the end-of-sequence token, when met, is the last one unless it is ignored."""
    # Plainly: some versions of transformers leave soft-capping out of their fused attention.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype="auto", attn_implementation="eager"
    ).eval()
    if ignore_eos:
        model.generation_config.eos_token_id = None
    answers = []
    for prompt, limit in zip(prompts, max_new_tokens, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers
