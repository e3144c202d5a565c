"""How each process of a system is started."""

from pathlib import Path

import msgspec
import pytest

from pipemax.proto.config import CudaDevice
from pipemax.services.launcher.processes import system_processes
from support.fake_system import fake_config

RUN_DIR = Path("/run")


def test_threads_are_those_of_the_configuration_and_do_not_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    config = msgspec.structs.replace(fake_config(), threads_per_stage=3)
    by_name = {spec.name: spec for spec in system_processes(config, Path("/run"))}
    assert by_name["stage-0"].env["OMP_NUM_THREADS"] == "3"
    assert by_name["coordinator"].env["OMP_NUM_THREADS"] == "1"
    assert {spec.env["OMP_WAIT_POLICY"] for spec in by_name.values()} == {"PASSIVE"}


def test_samplers_are_processes_of_their_own() -> None:
    assert not any(s.name.startswith("sampler") for s in system_processes(fake_config(), RUN_DIR))
    config = msgspec.structs.replace(fake_config(), sampler_workers=2, threads_per_stage=3)
    first, second = system_processes(config, RUN_DIR)[-2:]
    assert (first.name, second.name) == ("sampler-0", "sampler-1")
    assert first.argv[2:4] == ("-m", "pipemax.stage_worker.sampling")
    assert second.argv[-2:] == ("--index", "1")
    assert first.env["OMP_NUM_THREADS"] == "1"


def test_how_threads_wait_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    specs = system_processes(fake_config(), Path("/run"))
    assert {spec.env["OMP_WAIT_POLICY"] for spec in specs} == {"ACTIVE"}


def test_cpu_stages_ask_for_huge_pages_unless_malloc_is_tuned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    specs = system_processes(fake_config(), RUN_DIR)
    assert {spec.env.get("GLIBC_TUNABLES") for spec in specs if "stage" in spec.name} == {
        "glibc.malloc.hugetlb=1"
    }
    assert not any("GLIBC_TUNABLES" in spec.env for spec in specs if "stage" not in spec.name)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert not any(
        "GLIBC_TUNABLES" in spec.env for spec in system_processes(fake_config(), RUN_DIR)
    )


def test_what_opens_cuda_counts_gpus_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    cuda = CudaDevice(gpus=(0,), block_bytes=(1,))
    config = msgspec.structs.replace(
        fake_config(), pipeline_parallel_size=1, device="cuda", cuda=cuda
    )
    by_name = {spec.name: spec for spec in system_processes(config, Path("/run"))}
    order = {name: spec.env.get("CUDA_DEVICE_ORDER") for name, spec in by_name.items()}
    assert order == {"coordinator": None, "kv-daemon": "PCI_BUS_ID", "stage-0": "PCI_BUS_ID"}
    on_cpu = system_processes(fake_config(), Path("/run"))
    assert not any("CUDA_DEVICE_ORDER" in spec.env for spec in on_cpu)
