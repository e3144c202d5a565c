"""How each process of a system is started."""

from pathlib import Path

import msgspec
import pytest

from pipemax.services.launcher.processes import system_processes
from support.fake_system import fake_config


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


def test_how_threads_wait_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    specs = system_processes(fake_config(), Path("/run"))
    assert {spec.env["OMP_WAIT_POLICY"] for spec in specs} == {"ACTIVE"}
