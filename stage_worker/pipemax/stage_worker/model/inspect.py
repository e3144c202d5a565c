"""Looks at a model folder before any process starts: fast, and without torch or transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pipemax.proto.errors import ModelError, UnsupportedModelError
from pipemax.proto.geometry import DTYPE_BYTES, BlockGeometry, Dtype
from pipemax.stage_worker.model.families import Family, supported_family
from pipemax.stage_worker.model.safetensors_header import TensorEntry, read_header
from pipemax.stage_worker.modelled.catalogue import model_from_config

CONFIG_FILE: Final = "config.json"
INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
_HEADER_DTYPES: Final[dict[str, Dtype]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the launcher needs to know of a model."""

    architecture: str
    num_layers: int
    max_position_embeddings: int
    """Tokens of the longest sequence the model was made for."""
    vocab_size: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    dtype: Dtype
    """The checkpoint's own, which `--dtype auto` takes."""
    weights_bytes: int
    """Of all tensors in the checkpoint's files, as stored; of dummy weights, counted from the
    shape, about."""

    def kv_geometry(
        self, num_layers: int, block_size: int, dtype: Literal["auto"] | Dtype
    ) -> BlockGeometry:
        """Of the KV blocks of a stage with so many layers; `auto` is the checkpoint's dtype."""
        return BlockGeometry(
            num_layers=num_layers,
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype if dtype == "auto" else dtype,
        )


def inspect_model(model_dir: Path, load_format: Literal["auto", "dummy"] = "auto") -> ModelInfo:
    """Checks that the folder holds a model PipeMax can run; with `load_format` `dummy`, its shape.

    Raises ModelError (a folder or file that is missing or damaged) or UnsupportedModelError.
    """
    config = read_config(model_dir)
    family = supported_family(config)
    files = checkpoint_files(model_dir) if load_format == "auto" else ()
    headers = {path: read_header(path) for path in files}
    dtype = checkpoint_dtype(config, headers)
    if load_format == "dummy":
        parameters = model_from_config(model_dir / CONFIG_FILE).parameters
        weights_bytes = round(parameters * DTYPE_BYTES[dtype])
    else:
        entries = (entry for header in headers.values() for entry in header.values())
        weights_bytes = sum(entry.num_bytes for entry in entries)
    hidden_size = config_int(family, config, "hidden_size")
    num_heads = config_int(family, config, "num_attention_heads")
    return ModelInfo(
        architecture=family.architecture,
        num_layers=config_int(family, config, "num_hidden_layers"),
        max_position_embeddings=config_int(family, config, "max_position_embeddings"),
        vocab_size=config_int(family, config, "vocab_size"),
        hidden_size=hidden_size,
        num_kv_heads=config_int(family, config, "num_key_value_heads", num_heads),
        head_dim=_head_dim(family, config, hidden_size, num_heads),
        dtype=dtype,
        weights_bytes=weights_bytes,
    )


def read_config(model_dir: Path) -> dict[str, Any]:
    """The decoded config.json. Raises ModelError when folder or file is missing or not JSON."""
    if not model_dir.is_dir():
        raise ModelError(f"model folder {model_dir} does not exist; --model takes a local folder")
    path = model_dir / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{model_dir} has no {CONFIG_FILE}; is it a model folder?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    if (model_dir / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{model_dir} holds an adapter (adapter_config.json), which would be ignored; merge it "
            "into the model's weights first"
        )
    return config


def checkpoint_files(model_dir: Path) -> tuple[Path, ...]:
    """The safetensors files of the checkpoint, by its index if it has one."""
    index = model_dir / INDEX_FILE
    if (model_dir / SINGLE_FILE).exists():
        return (model_dir / SINGLE_FILE,)
    if index.exists():
        names = sorted(set(read_index(index).values()))
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index} names {name!r}, which is not a file of its folder")
            if not (model_dir / name).exists():
                raise ModelError(f"{index} names {name}, which is missing; download it again")
        return tuple(model_dir / name for name in names)
    others = sorted(path.name for path in model_dir.glob("*.safetensors"))
    if others:
        raise ModelError(
            f"{model_dir} has {others[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "download the missing file"
        )
    pickled = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")
        for path in model_dir.glob(pattern)
    )
    if pickled:
        raise ModelError(
            f"{model_dir} has no *.safetensors; {pickled[0]} is a pickle, which can run code, and "
            "is refused; convert it to safetensors"
        )
    raise ModelError(
        f"{model_dir} has no *.safetensors; download the model's weights, or run its shape with "
        "random ones: --load-format dummy"
    )


def read_index(index: Path) -> dict[str, str]:
    """Tensor name → file name. Raises ModelError when the index is damaged."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} cannot be read: {error}; download it again") from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ModelError(f"{index} has no map of tensor names to files; download it again")
    return weight_map


def config_int(
    family: Family, config: Mapping[str, Any], key: str, otherwise: int | None = None
) -> int:
    """A positive integer of config.json, or the family's default for it, or `otherwise`."""
    value = config[key] if key in config else family.defaults[key]
    value = otherwise if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{CONFIG_FILE}: `{key}` is {value!r}, not a positive whole number")
    return value


def _head_dim(family: Family, config: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    if not family.reads_head_dim:
        return hidden_size // num_heads
    return config_int(family, config, "head_dim", hidden_size // num_heads)


def checkpoint_dtype(
    config: Mapping[str, Any], headers: Mapping[Path, Mapping[str, TensorEntry]]
) -> Dtype:
    """The dtype config.json names (`dtype`, before transformers 5 `torch_dtype`), or else that of
    the checkpoint's first tensor. Raises UnsupportedModelError for any other than the three."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None:
        entries = (entry for header in headers.values() for entry in header.values())
        first = next(entries, None)
        named = None if first is None else _HEADER_DTYPES.get(first.dtype, first.dtype)
    for dtype in get_args(Dtype):
        if named == dtype:
            return dtype  # type: ignore[no-any-return]
    if named is None:
        raise ModelError(
            f'{CONFIG_FILE} names no `dtype`, and there is no tensor to take it from; add "dtype": '
            '"bfloat16" to it, or whichever it should be'
        )
    raise UnsupportedModelError(
        f"the checkpoint's dtype is {named!r}; supported are {', '.join(get_args(Dtype))}"
    )
