import ast
import inspect
import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipemax.proto import config
from pipemax.proto.config import CONFIG_FILE, CudaDevice, EngineConfig, load_config, save_config
from pipemax.proto.errors import ConfigError

_MINIMAL: dict[str, Any] = {
    "model": "/models/tiny",
    "served_model_name": "tiny",
    "layer_split": (2, 2),
    "pipeline_parallel_size": 2,
    "max_model_len": 512,
}


def test_comes_back_from_the_run_directory(tmp_path: Path) -> None:
    saved = EngineConfig(**_MINIMAL, emulate_link_bandwidth_bytes_s=10**9)
    save_config(saved, tmp_path)
    assert load_config(tmp_path) == saved
    assert saved.num_slots == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 257}, "block_size"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "cuda"}, "device"),
        ({"name": "../up"}, "name"),
        ({"name": "a" * 41}, "name"),
        ({"metrics_port": 65536}, "metrics_port"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes"),
        ({"kv_offloading_bytes": -1}, "kv_offloading_bytes"),
        ({"layer_split": [2, 0]}, "layer_split"),
        ({"gpu_memory_utilization": 0.9}, "gpu_memory_utilization"),
    ],
)
def test_a_bad_value_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(msgspec.json.encode(_MINIMAL | change))
    with pytest.raises(ConfigError, match=named):
        load_config(tmp_path)


def test_a_stage_says_what_it_computes_on() -> None:
    cuda = CudaDevice(gpus=(3, 1), block_bytes=(1, 1))
    named = msgspec.structs.replace(cuda, names=("Some GPU", "Another"))
    assert EngineConfig(**_MINIMAL).device_name(0) == "cpu"
    assert EngineConfig(**_MINIMAL, device="cuda", cuda=cuda).device_name(0) == "GPU 3"
    assert EngineConfig(**_MINIMAL, device="cuda", cuda=named).device_name(1) == "GPU 1 Another"
    with pytest.raises(ValueError, match=r"cuda\.names"):
        EngineConfig(**_MINIMAL, device="cuda", cuda=msgspec.structs.replace(cuda, names=("a",)))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"model": "\xff"}'])
def test_an_unreadable_file_says_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="pipemax up"):
        load_config(tmp_path)


def test_every_field_is_documented() -> None:
    """A string right below each field: unit, meaning, reason for the default."""
    tree = ast.parse(inspect.getsource(config))
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "EngineConfig"
    )
    documented = {
        field.target.id
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
    assert documented == set(EngineConfig.__struct_fields__)
