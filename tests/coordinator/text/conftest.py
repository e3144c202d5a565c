"""Model folders with small tokenizers of the kinds that models come with, trained here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The pump lifts water from the well, and the pipe carries it to the fields.",
    "Le vélo d'été roule près de la forêt; der Fluß fließt über Köln nach Süden.",
    "水は低きに流れる。管が詰まれば水は止まる。",
    "Numbers 0 1 2 3 4 5 6 7 8 9, signs !?.,;:-_()[]{}<>|/ and 🙂 faces 👩‍🚀.",
] * 4
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """As of Llama 3 or Qwen: byte-level BPE, begin-of-sequence from a template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As of Llama 2 or Mistral 7B: pieces with ▁ for a space, unknown characters as byte tokens,
    one leading space dropped in decoding."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    latin = [text for text in CORPUS if "水" not in text and "🙂" not in text]
    trained.train_from_iterator(latin, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: index for index, piece in enumerate([*pieces, *model["vocab"]])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level_tokenizer,
    "byte_fallback": byte_fallback_tokenizer,
}


def write_model_dir(
    directory: Path,
    tokenizer: Tokenizer | None,
    *,
    config: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A model folder without weights. `settings` go to tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    size = 600 if tokenizer is None else tokenizer.get_vocab_size()
    config = {"model_type": "llama", "vocab_size": size, "eos_token_id": 2, **(config or {})}
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
            **settings,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per kind of tokenizer, each with a chat template."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: write_model_dir(root / name, make(), chat_template=CHAT_TEMPLATE)
        for name, make in TOKENIZERS.items()
    }
