"""Which stage gets which GPU, and what a user reads when that cannot be."""

import subprocess
import sys
from typing import Any

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.services import gpus
from pipemax.services.gpus import assign_gpus, cuda_environment, find_gpus, look_at_gpus
from pipemax.stage_worker.devices.cuda.list_gpus import GpuReport


def gpu(ordinal: int, **changes: Any) -> GpuReport:
    values: dict[str, Any] = {
        "ordinal": ordinal,
        "name": "Simulated GPU",
        "pci_bus_id": f"0000:{ordinal:02x}:00.0",
        "total_bytes": 24 * 10**9,
        "free_bytes": 23 * 10**9,
        "compute_capability": (8, 6),
        "peers": (),
        "numa_node": None,
    }
    return GpuReport(**(values | changes))


def assign(asked: str | None, stages: int, there: int) -> tuple[tuple[int, ...], list[str]]:
    said: list[str] = []
    found = tuple(gpu(ordinal) for ordinal in range(there))
    return assign_gpus(asked, stages, found, said.append), said


@pytest.mark.parametrize(
    ("asked", "stages", "there", "expected"),
    [
        (None, 1, 1, (0,)),
        (None, 2, 4, (0, 1)),
        ("3,1", 2, 4, (3, 1)),
        ("0,0,1", 3, 2, (0, 0, 1)),
    ],
)
def test_one_gpu_for_each_stage(
    asked: str | None, stages: int, there: int, expected: tuple[int, ...]
) -> None:
    assert assign(asked, stages, there) == (expected, [])


def test_neighbours_share_where_gpus_are_few() -> None:
    assert assign(None, 4, 2) == ((0, 0, 1, 1), ["4 stages on 2 GPUs: GPU 0 has 2, GPU 1 has 2"])
    assert assign("2,0", 5, 3) == (
        (2, 2, 2, 0, 0),
        ["5 stages on 2 GPUs: GPU 2 has 3, GPU 0 has 2"],
    )
    assert assign(None, 3, 1)[0] == (0, 0, 0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("0,2", r"--gpus 0,2: there is no GPU 2; .* 0 Simulated GPU \(21\.4 GiB of 22\.4 GiB free"),
        ("0;1", "--gpus 0;1: write the ordinals"),
        ("", "--gpus : write the ordinals"),
        ("-1", "--gpus -1: write the ordinals"),
        ("0,1,0", "--gpus 0,1,0 names 3 GPUs, but --pipeline-parallel-size is 2"),
    ],
)
def test_what_is_not_there_is_named(asked: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assign(asked, 2, 2)


def test_a_gpu_that_cannot_be_used_is_left_out_unless_asked_for() -> None:
    broken = gpu(1, error="cudaErrorECCUncorrectable")
    found, said = (gpu(0), broken, gpu(2)), list[str]()
    assert assign_gpus(None, 2, found, said.append) == (0, 2)
    assert said == ["GPU 1 is left out: cudaErrorECCUncorrectable"]
    assert assign_gpus("0,2", 2, found, said.append) == (0, 2)
    with pytest.raises(ConfigError, match="--gpus 1: GPU 1 cannot be used: cudaErrorECC"):
        assign_gpus("1", 1, found, said.append)
    with pytest.raises(ConfigError, match="--device cuda: no GPU can be used: cudaErrorECC"):
        assign_gpus(None, 1, (broken,), said.append)


def test_looking_leaves_a_line_where_there_is_no_gpu() -> None:
    """On a machine with one, what it sees."""
    found = look_at_gpus()
    assert bool(found.gpus) == (found.error is None)
    if found.error is not None:
        assert "\n" not in found.error
        with pytest.raises(ConfigError, match="--device cuda"):
            find_gpus()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; print('x'); sys.exit('libcuda is broken')", "libcuda is broken"),
        ("import os; os.abort()", "exit status -6"),
        ("print('no json')", "JSON is malformed"),
    ],
)
def test_a_child_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    real = subprocess.run

    def run(command: list[str], **settings: Any) -> Any:
        assert command[-1] == "pipemax.stage_worker.devices.cuda.list_gpus"
        return real([sys.executable, "-c", code], **settings)

    monkeypatch.setattr(gpus.subprocess, "run", run)
    with pytest.raises(
        ConfigError, match=rf"--device cuda: looking at the GPUs failed: .*{reason}"
    ):
        find_gpus()


def test_ordinals_are_those_of_nvidia_smi_unless_the_user_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert cuda_environment() == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert cuda_environment() == {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
