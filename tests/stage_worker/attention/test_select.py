"""Which backend a stage gets, and what is said when it cannot be had."""

import builtins
import importlib
import importlib.util
import logging
import sys
from typing import Any

import pytest
import torch

from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import BlockGeometry
from pipemax.stage_worker.attention.device import select
from pipemax.stage_worker.attention.device.select import open_attention
from support import fake_flashinfer

_GEOMETRY = BlockGeometry(2, 16, 2, 64, "bfloat16")
_CPU, _GPU = torch.device("cpu"), torch.device("cuda", 0)


def _without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find_spec, real_import = importlib.util.find_spec, builtins.__import__

    def find(name: str, *rest: Any) -> Any:
        return None if name in packages else find_spec(name, *rest)

    def refuse(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] in packages or name.endswith(tuple(f"{p}_backend" for p in packages)):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *rest, **options)

    monkeypatch.setattr(select.importlib.util, "find_spec", find)
    monkeypatch.setattr(builtins, "__import__", refuse)


def _write_module() -> Any:
    pytest.importorskip("triton")
    return importlib.import_module("pipemax.stage_worker.attention.device.write")


def test_plain_torch_can_be_asked_for() -> None:
    attention = open_attention(_GEOMETRY, 8, "reference", _GPU)
    assert attention.backend.name == "reference"
    assert attention.tile_tokens == 16
    assert attention.dtype == torch.bfloat16


def test_a_device_without_kernels_gets_plain_torch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert open_attention(_GEOMETRY, 8, "auto", _CPU).backend.name == "reference"
    assert [record.message for record in caplog.records] == ["attention: reference"]


def test_a_gpu_without_packages_gets_plain_torch_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _without(monkeypatch, "flashinfer", "triton")
    assert open_attention(_GEOMETRY, 8, "auto", _GPU).backend.name == "reference"
    assert "neither flashinfer nor triton" in caplog.text


@pytest.mark.parametrize("package", ["triton", "flashinfer"])
def test_a_package_asked_for_by_name_must_be_there(
    monkeypatch: pytest.MonkeyPatch, package: Any
) -> None:
    _without(monkeypatch, package)
    with pytest.raises(ConfigError, match=f"--attention-backend {package}"):
        open_attention(_GEOMETRY, 8, package, _GPU)


def test_triton_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    _without(monkeypatch, "flashinfer")
    monkeypatch.setattr(select, "_multiprocessors", lambda device: 132)
    assert open_attention(_GEOMETRY, 8, "auto", _GPU).backend.name == "triton"


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        (BlockGeometry(2, 16, 2, 64, "float32"), "no float32 kernels"),
        (BlockGeometry(2, 16, 2, 80, "bfloat16"), "not 80"),
    ],
)
def test_triton_takes_models_that_flashinfer_cannot(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    geometry: BlockGeometry,
    reason: str,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)  # type: ignore[arg-type]
    assert open_attention(geometry, 8, "flashinfer", _CPU).backend.name == "triton"
    assert reason in caplog.text


def test_triton_takes_over_where_flashinfer_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it does where it must compile its kernels and there is no compiler."""
    write = _write_module()

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("nvcc not found\nmore lines")

    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)  # type: ignore[arg-type]
    monkeypatch.setattr(write, "write_kv", fake_flashinfer.write_kv)
    monkeypatch.setattr(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper, "plan", fail)
    assert open_attention(_GEOMETRY, 8, "flashinfer", _CPU).backend.name == "triton"
    assert "failed: nvcc not found" in caplog.text
    assert "more lines" not in caplog.text


def test_flashinfer_is_taken_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    write = _write_module()
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)  # type: ignore[arg-type]
    monkeypatch.setattr(write, "write_kv", fake_flashinfer.write_kv)
    assert open_attention(_GEOMETRY, 8, "flashinfer", _CPU).backend.name == "flashinfer"
    fake_flashinfer.queue.clear()
