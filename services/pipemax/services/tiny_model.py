"""A model made here: random weights in Llama's shape and a tokenizer trained on bundled text.

It says nothing sensible, and everything PipeMax does with a model can be shown and tested with
it, without a download and without torch. The same arguments give the same files.
"""

import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipemax.proto.errors import ConfigError

DATA_DIR = Path(__file__).parent / "data"
BOS, EOS = "<|begin|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, EOS, SYSTEM, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

VOCAB_SIZE = 1024
ANY_VOCAB_SIZE = 2**20
"""More token ids than any model has."""
ANY_LENGTH = 2**30
"""Tokens; more than any sequence has."""

_ATTENTION_GAIN = 3.0
"""Queries and keys larger than usual: attention then picks few tokens, so that what comes next
depends on the context and greedy output does not fall into one loop."""
_RESIDUAL_GAIN = 0.7
_LOGIT_GAIN = 3.0
"""Spreads the logits: ties and near-ties between the two likeliest tokens become rare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-like model. The defaults make about 2 million parameters."""

    num_layers: int = 4
    hidden_size: int = 192
    intermediate_size: int = 512
    num_heads: int = 6
    num_kv_heads: int = 2
    vocab_size: int = VOCAB_SIZE
    """Of the model. The tokenizer has as many tokens, or fewer where the bundled text gives no
    more."""
    max_position_embeddings: int = 2048
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


SHAPE_100M = ModelShape(
    num_layers=12,
    hidden_size=768,
    intermediate_size=2048,
    num_heads=12,
    num_kv_heads=4,
    vocab_size=16_384,
    dtype="bfloat16",
)
"""About 100 million parameters, for benchmarks."""


def make_demo_model(directory: Path, seed: int = 0, shape: ModelShape | None = None) -> Path:
    """Writes a model folder: config.json, generation_config.json, model.safetensors, tokenizer.json
    and tokenizer_config.json with a chat template. Returns `directory`.

    Raises ConfigError when the sizes do not fit together or the folder cannot be written.
    """
    shape = shape or ModelShape()
    _check(shape)
    tokenizer = train_tokenizer(shape.vocab_size)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_json(directory / "config.json", _model_config(shape, tokenizer))
        _write_text_files(directory, tokenizer, shape.max_position_embeddings)
        _write_weights(directory / "model.safetensors", shape, seed)
    except OSError as error:
        raise ConfigError(
            f"cannot write the model to {directory}: {error.strerror}; give a writable folder"
        ) from error
    return directory


def make_text_folder(directory: Path) -> Path:
    """Writes what the coordinator reads of a model, for one that is only modelled: a vocabulary and
    the same tokenizer and chat template, whatever the model's own are. Prompts may bring token ids
    of any model; those beyond the tokenizer's read as nothing. Returns `directory`."""
    tokenizer = train_tokenizer(VOCAB_SIZE)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", {"vocab_size": ANY_VOCAB_SIZE})
    _write_text_files(directory, tokenizer, ANY_LENGTH)
    return directory


def _write_text_files(directory: Path, tokenizer: Tokenizer, max_length: int) -> None:
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)},
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def bundled_text() -> str:
    """The text that comes with PipeMax, written for it."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(DATA_DIR.glob("*.txt")))


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with at most `vocab_size` tokens, trained on the bundled text. It
    begins every plain prompt with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(bundled_text().splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def demo_requests(count: int = 64, seed: int = 0, *, model: str = "demo") -> list[dict[str, Any]]:
    """`count` OpenAI batch lines for the demo model, as JSON objects: prompts of a few to about 220
    tokens cut from the bundled text, every fourth a chat, half greedy and half sampled with a
    seed, 8 to 120 output tokens."""
    chance = random.Random(seed)
    words = bundled_text().split(" ")
    return [_demo_request(index, chance, words, model) for index in range(count)]


def _demo_request(
    index: int, chance: random.Random, words: list[str], model: str
) -> dict[str, Any]:
    length = chance.choice((4, 16, 60, 150))
    start = chance.randrange(len(words) - length)
    text = " ".join(words[start : start + length])
    is_chat = index % 4 == 3
    body: dict[str, Any] = {"model": model, "max_tokens": chance.randint(8, 120)}
    if is_chat:
        system = {"role": "system", "content": "Answer in one sentence."}
        body["messages"] = [system, {"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if index % 2:
        body |= {"temperature": 0.8, "top_p": 0.95, "seed": chance.randrange(2**31)}
    else:
        body["temperature"] = 0.0
    return {
        "custom_id": f"demo-{index}",
        "method": "POST",
        "url": "/v1/chat/completions" if is_chat else "/v1/completions",
        "body": body,
    }


def _check(shape: ModelShape) -> None:
    smallest = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    if shape.vocab_size < smallest:
        raise ConfigError(f"vocab_size {shape.vocab_size} is too small; give at least {smallest}")
    if shape.hidden_size % shape.num_heads or shape.head_dim % 2:
        raise ConfigError(
            f"hidden_size {shape.hidden_size} does not split into {shape.num_heads} heads of an "
            "even number of values"
        )
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(
            f"num_heads {shape.num_heads} is not a multiple of num_kv_heads {shape.num_kv_heads}"
        )


def _model_config(shape: ModelShape, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": shape.dtype,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
    }


def _tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and standard deviation of every tensor; 0 stands for a norm's ones."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries = shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden), 1.0
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,), 0.0
        yield prefix + "self_attn.q_proj.weight", (queries, hidden), _scale(hidden, _ATTENTION_GAIN)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden), _scale(hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden), _scale(hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries), _scale(queries, _RESIDUAL_GAIN)
        yield prefix + "post_attention_layernorm.weight", (hidden,), 0.0
        yield prefix + "mlp.gate_proj.weight", (inner, hidden), _scale(hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden), _scale(hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner), _scale(inner, _RESIDUAL_GAIN)
    yield "model.norm.weight", (hidden,), 0.0
    yield "lm_head.weight", (shape.vocab_size, hidden), _scale(hidden, _LOGIT_GAIN)


def _scale(fan_in: int, gain: float = 1.0) -> float:
    return gain / float(np.sqrt(fan_in))


def _write_weights(path: Path, shape: ModelShape, seed: int) -> None:
    """Writes a safetensors file tensor by tensor: the length of the header (8 bytes, little
    endian), the header in JSON, the data. (The library's own writer for NumPy has no bfloat16.)"""
    item_bytes = 2 if shape.dtype == "bfloat16" else 4
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims, _ in _tensors(shape):
        start, end = end, end + int(np.prod(dims)) * item_bytes
        header[name] = {
            "dtype": "BF16" if shape.dtype == "bfloat16" else "F32",
            "shape": dims,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, dims, scale in _tensors(shape):
            values = np.ones(dims, np.float32)
            if scale:
                values = generator.standard_normal(dims, np.float32) * np.float32(scale)
            file.write((to_bfloat16(values) if item_bytes == 2 else values).tobytes())


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of `values` rounded to bfloat16, to nearest, ties to even. Values are finite."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
