"""The launcher's look at a model folder: what it reports, and the one line for what is wrong."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipemax.proto.errors import ModelError, UnsupportedModelError
from pipemax.stage_worker.model.families import FAMILIES, SUPPORTED_ARCHITECTURES, Family
from pipemax.stage_worker.model.inspect import ModelInfo, config_int, inspect_model
from support.model_zoo import build_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may damage."""
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def _change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_reports_the_model(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    assert inspect_model(llama) == ModelInfo(
        architecture="LlamaForCausalLM",
        num_layers=4,
        max_position_embeddings=1024,
        vocab_size=512,
        hidden_size=64,
        num_kv_heads=2,
        head_dim=16,
        dtype="float32",
        weights_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_defaults_are_those_of_transformers(family: Family) -> None:
    """config.json may leave out what transformers' configuration class assumes."""
    config = CONFIG_MAPPING[family.model_type]()
    for key in ("max_position_embeddings", "vocab_size", "hidden_size", "num_hidden_layers"):
        assert family.defaults[key] == getattr(config, key)
    heads = config_int(family, {}, "num_attention_heads")
    assert heads == config.num_attention_heads
    assert config_int(family, {}, "num_key_value_heads", heads) == getattr(
        config, "num_key_value_heads", heads
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    assert config_int(family, {}, "head_dim", config.hidden_size // heads) == head_dim


def test_sharded_checkpoint(tmp_path: Path, llama: Path) -> None:
    build_model("llama", tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert inspect_model(tmp_path) == inspect_model(llama)


def test_dtype_of_the_tensors_when_the_configuration_names_none(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    assert inspect_model(folder).dtype == "bfloat16"
    _change_config(folder, torch_dtype="float16")
    assert inspect_model(folder).dtype == "float16"


def test_needs_neither_torch_nor_transformers(llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipemax.stage_worker.model.inspect import inspect_model\n"
        f"inspect_model(Path({str(llama)!r}))\n"
        "assert not {'torch', 'transformers', 'numba', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere does not exist; --model takes a local folder"):
        inspect_model(tmp_path / "nowhere")


def test_missing_and_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        inspect_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="does not hold a JSON object"):
        inspect_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        inspect_model(folder)


@pytest.mark.parametrize("value", [0, -3, "four", 2.5, True])
def test_config_values_that_make_no_sense(folder: Path, value: object) -> None:
    _change_config(folder, num_hidden_layers=value)
    with pytest.raises(ModelError, match="`num_hidden_layers` is"):
        inspect_model(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no \*\.safetensors; download"):
        inspect_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*refused; convert it"):
        inspect_model(folder)


def test_weights_without_their_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"has model-00001-of-00002\.safetensors but neither"):
        inspect_model(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is missing"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a file of its folder"),
        ('{"weight_map": {"a": 1}}', "has no map of tensor names to files"),
        ("{}", "cannot be read"),
        ("not json", "cannot be read"),
    ],
)
def test_damaged_index(folder: Path, index: str, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        inspect_model(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], r"model\.safetensors is truncated: its tensors need"),
        (lambda data: data[:500], r"model\.safetensors is truncated: .* inside the header"),
        (lambda data: data[:5], "is truncated"),
        (lambda data: b"", "is truncated"),
        (lambda data: data + b"x", "has trailing bytes"),
        (lambda data: b"\xff" * 64, "is not a safetensors file"),
        (lambda data: struct.pack("<Q", 8) + b"not json", "is not a safetensors file"),
        (lambda data: struct.pack("<Q", 8) + b'{"a": 1}', "damaged header"),
        (lambda data: struct.pack("<Q", 2) + b"[]", "damaged header"),
    ],
)
def test_damaged_weights(folder: Path, damage, message: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=message):
        inspect_model(folder)


def test_unknown_architecture(folder: Path) -> None:
    _change_config(folder, architectures=["BloomForCausalLM"])
    with pytest.raises(UnsupportedModelError) as caught:
        inspect_model(folder)
    assert "BloomForCausalLM is not supported" in str(caught.value)
    assert all(name in str(caught.value) for name in SUPPORTED_ARCHITECTURES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"model_type": "gpt2"}, "with model_type 'gpt2'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "`quantization_config` is refused"),
        ({"use_bidirectional_attention": True}, "only causal attention"),
        ({"is_causal": False}, "only causal attention"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "`per_layer_config` is refused"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rotary scaling 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "'dynamic'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
    ],
)
def test_refused_by_name(folder: Path, changes: dict[str, object], message: str) -> None:
    _change_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        inspect_model(folder)


def test_harmless_settings_are_accepted(folder: Path) -> None:
    _change_config(
        folder,
        quantization_config=None,
        rope_scaling=None,
        use_bidirectional_attention=False,
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0},
    )
    assert inspect_model(folder).num_layers == 4


def test_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"holds an adapter .* merge it"):
        inspect_model(folder)
