"""The catalogues, a user's file on top, and shapes from config.json."""

import json
from pathlib import Path

import pytest

from pipemax.proto.errors import ConfigError, ModelError
from pipemax.stage_worker.modelled.catalogue import load_catalogue, model_from_config

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def test_names_are_found_however_they_are_written() -> None:
    catalogue = load_catalogue()
    assert catalogue.gpu("RTX 5090") is catalogue.gpu("rtx-5090")
    assert catalogue.model("Llama-2-70B").num_kv_heads == 8
    with pytest.raises(ConfigError, match=r"'H9000' is not known; known are a10, l20"):
        catalogue.gpu("H9000")
    with pytest.raises(ConfigError, match=r"neither a folder with a config\.json nor known"):
        catalogue.model("no-such-model")


def test_a_file_adds_and_replaces(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(
        "[gpus.l20]\nmemory_gb = 96\nhbm_gb_s = 1\nbf16_tflop_s = 1\nhost_link_gb_s = 1\n"
        "[models.mine]\nnum_layers = 2\nhidden_size = 8\nnum_heads = 2\nnum_kv_heads = 1\n"
        "head_dim = 4\nparameters = 0.5\n"
    )
    catalogue = load_catalogue(mine)
    assert catalogue.gpu("l20").memory_bytes == 96e9
    assert catalogue.model("mine").active_parameters == 0.5e9
    assert catalogue.gpu("a10").memory_bytes == 24e9


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[gpu.x]\n", "'gpu' is unknown"),
        ("[gpus.x]\nmemory_gb = 1\n", "gpus.x lacks hbm_gb_s"),
        ("[gpus.x]\nmemory = 1\n", "unknown field 'memory'"),
        ("[gpus.x]\nmemory_gb = -1\n", "is -1, which is no positive number"),
        ("not toml", "is not TOML"),
        (
            "[models.x]\nnum_layers = 2\nhidden_size = 8\nnum_heads = 2\nnum_kv_heads = 1\n"
            "head_dim = 4\nparameters = 1\nnum_experts = 4\n",
            "a mixture of experts needs all three",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, reason: str) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.toml") as found:
        load_catalogue(mine)
    assert reason in str(found.value)


@pytest.mark.parametrize(
    ("config", "parameters", "active"), [(LLAMA_70B, 69.0, 69.0), (MIXTRAL, 46.7, 12.9)]
)
def test_parameters_are_counted_from_config_json(
    tmp_path: Path, config: dict[str, int], parameters: float, active: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = load_catalogue().model(str(tmp_path))
    assert shape.parameters / 1e9 == pytest.approx(parameters, rel=0.01)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.01)
    assert shape.head_dim == 128


def test_a_config_without_a_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(ModelError, match="hidden_size is None"):
        model_from_config(path)
    path.write_text("[]")
    with pytest.raises(ModelError, match="does not hold an object"):
        model_from_config(path)
