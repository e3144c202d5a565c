"""What a bug report says of a machine with GPUs, and of one without."""

from pathlib import Path

import pytest

from pipemax.services import collect_env
from pipemax.services.collect_env import describe_environment
from pipemax.stage_worker.devices.cuda.list_gpus import GpuList

from .test_gpus import gpu


def test_gpus_with_what_the_layout_of_a_machine_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    found = GpuList(
        gpus=(gpu(0, peers=(1,), numa_node=1), gpu(1, free_bytes=0), gpu(2, error="dead"))
    )
    monkeypatch.setattr(collect_env, "look_at_gpus", lambda: found)
    lines = dict(describe_environment())
    assert lines["GPU 0"] == (
        "Simulated GPU, 21.4 GiB of 22.4 GiB free, compute capability 8.6, 0000:00:00.0, "
        "memory node 1, reads the memory of: 1"
    )
    assert lines["GPU 1"].startswith("Simulated GPU, 0 B of 22.4 GiB free")
    assert lines["GPU 1"].endswith("0000:01:00.0, reads the memory of: none")
    assert lines["GPU 2"] == "cannot be used: dead"
    assert {"triton", "flashinfer-python", "memory nodes", "pinned memory"} <= lines.keys()


def test_no_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_env, "look_at_gpus", lambda: GpuList(error="no driver"))
    assert dict(describe_environment())["GPUs"] == "none: no driver"


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("echo 'Some GPU, 24576 MiB, 580.1'; echo 'Some GPU, 24576 MiB, 580.1'",
         "Some GPU, 24576 MiB, 580.1; Some GPU, 24576 MiB, 580.1"),
        ("exit 9", "nvidia-smi failed: "),
        ("true", "no GPU"),
    ],
)  # fmt: skip
def test_the_driver_is_what_nvidia_smi_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, shown: str
) -> None:
    monkeypatch.setattr(collect_env, "look_at_gpus", GpuList)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dict(describe_environment())["GPU driver"] == "no nvidia-smi"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    assert dict(describe_environment())["GPU driver"].startswith(shown)
