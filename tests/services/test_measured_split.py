"""`--layer-split auto` from the command's options to a configuration, by way of child processes."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipemax.proto.config import CudaDevice, EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.services import measured_split as splitting
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.layer_split import StageRoom
from pipemax.services.measured_split import StageDevice, measured_split
from pipemax.stage_worker.layer_costs import ModelCosts, PartCost
from pipemax.stage_worker.model.inspect import ModelInfo
from support.model_zoo import build_model

INFO = ModelInfo("LlamaForCausalLM", 12, 512, 64, 32, 2, 8, "float32", 1000)


def costs(layer_ms: float, head_ms: float = 0.0) -> ModelCosts:
    layer = PartCost(fixed_s=layer_ms / 1e3)
    return ModelCosts(
        layers=(layer,) * 12,
        layer_bytes=(100,) * 12,
        embedding=PartCost(),
        embedding_bytes=0,
        head=PartCost(fixed_s=head_ms / 1e3),
        head_bytes=0,
        step=PartCost(fixed_s=1e-4),
    )


def config(**changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "model": "m",
        "served_model_name": "m",
        "pipeline_parallel_size": 3,
        "layer_split": (4, 4, 4),
        "max_model_len": 512,
    }
    return EngineConfig(**(values | changes))


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Runs `code` in the place of the measurement; `config` is what it was asked for."""
    real = subprocess.Popen
    read = "import sys, json; config = json.load(sys.stdin)\n"

    def start(command: list[str], **settings: Any) -> Any:
        assert command[-1] == "pipemax.stage_worker.measure"
        return real([sys.executable, "-c", read + code], **settings)

    monkeypatch.setattr(splitting.subprocess, "Popen", start)


CPU = StageDevice("cpu", None, 1, StageRoom(None, 10**9))


def test_each_kind_of_gpu_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GPU 1 is half as fast; stages 0 and 1 share GPU 0."""
    answers = {gpu: msgspec.json.encode(costs(ms)).decode() for gpu, ms in ((0, 1.0), (1, 2.0))}
    child(
        monkeypatch,
        f"gpu, = config['cuda']['gpus']\nopen({str(tmp_path)!r} + f'/{{gpu}}', 'x')\n"
        f"print({answers!r}[gpu])",
    )
    cuda = CudaDevice(gpus=(0, 0, 1), block_bytes=(1, 1, 1))
    room = StageRoom(10**9, None)
    devices = [
        StageDevice("fast", 0, 2, room),
        StageDevice("fast", 0, 2, room),
        StageDevice("slow", 1, 1, room),
    ]
    told: list[str] = []
    found, by_stage = measured_split(
        config(device="cuda", cuda=cuda, kv_cache_memory_bytes=None),
        INFO,
        devices,
        None,
        told.append,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    assert found.layers == (4, 4, 4)  # all three take 2 ms a layer
    assert [cost.layers[0].fixed_s for cost in by_stage] == [2e-3] * 3
    assert told[1:] == [
        "layer split 4,4,4: measured, a decode step of 256 requests takes 8.20, 8.20, 8.10 ms"
    ]


def test_the_line_says_what_was_won(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, f"print({msgspec.json.encode(costs(1.0, head_ms=3.0)).decode()!r})")
    told: list[str] = []
    found, _ = measured_split(config(), INFO, [CPU] * 3, 100, told.append)
    assert found.layers == (5, 5, 2)
    assert "--layer-split even does without" in told[0]
    assert told[1:] == [
        "layer split 5,5,2: measured, a decode step of 256 requests takes 5.10, 5.10, 5.10 ms; "
        "evenly, as 4,4,4, a decode step of 256 requests takes 4.10, 4.10, 7.10 ms, which serves "
        "28.2% fewer requests"
    ]


def test_layers_are_measured_in_the_environment_of_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    child(
        monkeypatch,
        "import os; assert os.environ['GLIBC_TUNABLES'] == 'glibc.malloc.hugetlb=1'\n"
        "assert os.environ['OMP_NUM_THREADS'] == '3'\n"
        f"print({msgspec.json.encode(costs(1.0)).decode()!r})",
    )
    measured_split(config(threads_per_stage=3), INFO, [CPU] * 3, 100, lambda line: None)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit('CUDA out of memory')", "CUDA out of memory"),
        ("import os; os.abort()", f"exit status -{signal.SIGABRT:d}"),
        ("print('{}')", "missing required field"),
        ("import time; time.sleep(60)", "no result after 0.5 s"),
    ],
)
def test_a_measurement_that_fails_says_what_does_without(
    monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    monkeypatch.setattr(splitting, "_TIMEOUT_S", 0.5 if "sleep" in code else 60.0)
    child(monkeypatch, code)
    with pytest.raises(ConfigError, match=f"--layer-split auto: .*{reason}.*--layer-split even"):
        measured_split(config(), INFO, [CPU] * 3, None, print)


def test_layers_of_a_real_model_are_measured_on_the_cpu(tmp_path: Path) -> None:
    folder = build_model("llama", tmp_path, num_hidden_layers=8)
    options = EngineOptions(
        model=str(folder),
        layer_split="auto",
        pipeline_parallel_size=2,
        max_num_seqs=4,
        max_model_len=128,
        kv_cache_memory_bytes="1MiB",
        kv_offloading_size="1MiB",
        threads_per_stage=1,
    )
    told: list[str] = []
    found = build_config(options, "test", told.append)
    first, second = found.layer_split
    assert first + second == 8
    assert told[1].startswith(f"layer split {first},{second}: measured, a decode step of ")
