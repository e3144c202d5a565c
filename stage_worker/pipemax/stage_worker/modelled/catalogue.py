"""GPUs and models by name: data files, a user's own file on top, and any model's config.json."""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipemax.proto.errors import ConfigError, ModelError
from pipemax.proto.modelled import Gpu as Gpu
from pipemax.proto.modelled import ModelShape as ModelShape

_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Known GPUs and models by name."""

    gpus: Mapping[str, Gpu] = field(default_factory=dict)
    models: Mapping[str, ModelShape] = field(default_factory=dict)

    def gpu(self, name: str) -> Gpu:
        """Raises ConfigError for an unknown name."""
        found = self.gpus.get(_normal(name))
        if found is None:
            raise ConfigError(
                f"GPU {name!r} is not known; known are {', '.join(sorted(self.gpus))}; add others "
                "in a file given with --catalogue"
            )
        return found

    def model(self, name: str) -> ModelShape:
        """`name` is one of the catalogue's, a model folder or a config.json. Raises ConfigError for
        an unknown name, ModelError for a config.json without the needed fields."""
        found = self.models.get(_normal(name))
        if found is not None:
            return found
        path = Path(name)
        if path.is_dir():
            path = path / "config.json"
        if path.is_file():
            return model_from_config(path)
        raise ConfigError(
            f"model {name!r} is neither a folder with a config.json nor known by name; known are "
            f"{', '.join(sorted(self.models))}"
        )


def load_catalogue(extra: Path | None = None) -> Catalogue:
    """The built-in catalogue, with the entries of the file `extra` on top. Raises ConfigError
    naming the file and the entry that cannot be read."""
    gpus: dict[str, Gpu] = {}
    models: dict[str, ModelShape] = {}
    data = files("pipemax.stage_worker.modelled").joinpath("data")
    sources = [(name, data.joinpath(name).read_text()) for name in ("gpus.toml", "models.toml")]
    if extra is not None:
        try:
            sources.append((str(extra), extra.read_text()))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the catalogue {extra}: {error}") from error
    for source, text in sources:
        tables = _parse(source, text)
        for name, table in tables.get("gpus", {}).items():
            gpus[_normal(name)] = _gpu(source, _normal(name), table)
        for name, table in tables.get("models", {}).items():
            models[_normal(name)] = _model(source, _normal(name), table)
    return Catalogue(gpus, models)


def model_from_config(path: Path) -> ModelShape:
    """Shape of a decoder from its config.json. Parameters are counted from the shape: attention,
    gated feed-forward (each expert, if there are any), embedding and head. Raises ModelError."""
    try:
        config = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not hold an object")
    config = config.get("text_config", config)
    hidden = _field(config, path, "hidden_size")
    layers = _field(config, path, "num_hidden_layers")
    heads = _field(config, path, "num_attention_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
    per_token = int(config.get("num_experts_per_tok") or 1) if experts > 1 else 1
    width_key = "moe_intermediate_size" if "moe_intermediate_size" in config else ""
    width = _field(config, path, width_key or "intermediate_size")
    vocabulary = _field(config, path, "vocab_size")
    tied = bool(config.get("tie_word_embeddings"))
    shared = layers * 2 * hidden * head_dim * (heads + kv_heads)
    shared += vocabulary * hidden * (1 if tied else 2)
    expert = layers * 3 * hidden * width
    name = path.parent.name if path.name == "config.json" else path.stem
    return ModelShape(
        name or str(path),
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        float(shared + experts * expert),
        float(shared + per_token * expert),
        experts,
        per_token,
    )


def _parse(source: str, text: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    for name, value in tables.items():
        if name not in ("gpus", "models") or not isinstance(value, dict):
            raise ConfigError(f"{source}: {name!r} is unknown; write [gpus.NAME] or [models.NAME]")
    return tables


def _gpu(source: str, name: str, table: object) -> Gpu:
    known = ("memory_gb", "hbm_gb_s", "bf16_tflop_s", "host_link_gb_s")
    values = _numbers(source, f"gpus.{name}", table, known, ())
    return Gpu(
        name,
        values["memory_gb"] * _GIGA,
        values["hbm_gb_s"] * _GIGA,
        values["bf16_tflop_s"] * 1e12,
        values["host_link_gb_s"] * _GIGA,
    )


def _model(source: str, name: str, table: object) -> ModelShape:
    whole = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")
    optional = ("active_parameters", "num_experts", "experts_per_token")
    values = _numbers(source, f"models.{name}", table, (*whole, "parameters"), optional)
    parameters = values["parameters"] * _GIGA
    active = values.get("active_parameters", values["parameters"]) * _GIGA
    experts = int(values.get("num_experts", 1))
    per_token = int(values.get("experts_per_token", 1))
    if (
        per_token > experts
        or active > parameters
        or (experts == per_token) != (active == parameters)
    ):
        raise ConfigError(
            f"{source}: models.{name}: active_parameters, num_experts and experts_per_token do not "
            "fit together; a mixture of experts needs all three, a dense model none"
        )
    return ModelShape(
        name,
        int(values["num_layers"]),
        int(values["hidden_size"]),
        int(values["num_heads"]),
        int(values["num_kv_heads"]),
        int(values["head_dim"]),
        parameters,
        active,
        experts,
        per_token,
    )


def _numbers(
    source: str, entry: str, table: object, needed: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, float]:
    if not isinstance(table, dict):
        raise ConfigError(f"{source}: {entry} is not a table")
    values: dict[str, float] = {}
    for key, value in table.items():
        if key not in needed and key not in optional:
            raise ConfigError(f"{source}: {entry} has the unknown field {key!r}")
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{source}: {entry}.{key} is {value!r}, which is no positive number")
        values[key] = value
    missing = [key for key in needed if key not in values]
    if missing:
        raise ConfigError(f"{source}: {entry} lacks {', '.join(missing)}")
    return values


def _field(config: Mapping[str, Any], path: Path, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{path}: {key} is {value!r}, which is no positive whole number")
    return value


def _normal(name: str) -> str:
    return name.strip().lower().replace(" ", "-").replace(".", "_")
