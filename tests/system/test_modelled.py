"""Modelled GPUs: eight stages are eight processes, and KV that is wrong anywhere is noticed."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from pipemax.client import Client
from pipemax.proto.messages.ingest import Status
from pipemax.proto.process import EXIT_FATAL, error_file
from support.background import Background
from support.command import eventually
from support.forkserver import start_process
from support.local_system import LocalSystem
from support.modelled_system import Work, modelled_config

VOCAB_SIZE = 1024
NUM_STAGES = 8
REPORT_S = 0.3
"""After this the daemon has reported its last copies, and the coordinator has counted them."""
SMALL: dict[str, Any] = {"device_blocks": 40, "host_blocks": 2000}
"""A device pool of about a third of the working set."""


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(count=14, most_outputs=28, vocab_size=VOCAB_SIZE)


def wait_for(client: Client, condition: Callable[[Status], bool]) -> Status:
    found: list[Status] = []

    def look() -> bool:
        found[:] = [client.status()]
        return condition(found[0])

    assert eventually(look, 30), found
    return found[0]


def test_eight_stages_move_kv_and_give_the_tokens_of_a_right_run(work: Work) -> None:
    config = modelled_config(stages=NUM_STAGES, **SMALL)
    with LocalSystem(config) as system, system.client() as client:
        ready = system.wait_ready(client)
        assert len({stage.pid for stage in ready.stages}) == NUM_STAGES
        assert work.run(client) == work.expected
        status = wait_for(client, lambda s: s.host_blocks_used == 0)
        assert status.device_blocks_used == 0
        time.sleep(REPORT_S)
        status = client.status()
    assert config.modelled is not None
    block_bytes = config.modelled.block_bytes(config.layer_split[0], config.block_size)
    assert status.device_blocks_total == SMALL["device_blocks"]
    assert status.host_blocks_total == SMALL["host_blocks"]
    assert status.decode_prefetched_tokens > 0
    assert status.load_bytes > 0
    assert status.load_bytes % block_bytes == status.store_bytes % block_bytes == 0
    for stage in status.stages:
        assert sum(stage.state_seconds.values()) == pytest.approx(status.uptime_s, rel=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"stages": 2, "device_blocks": 40, "host_blocks": 0},
        {"stages": 1, **SMALL},
        {"stages": 2, **SMALL, "activation_transport": "tcp", "policy": "pipemax"},
    ],
    ids=["without offloading", "one stage", "tcp"],
)
def test_tokens_do_not_depend_on_stages_or_offloading(work: Work, settings: dict[str, Any]) -> None:
    with LocalSystem(modelled_config(**settings)) as system, system.client() as client:
        system.wait_ready(client)
        assert work.run(client) == work.expected
        time.sleep(REPORT_S)
        assert (client.status().load_bytes > 0) == (settings["host_blocks"] > 0)


def test_killed_processes_change_no_token(work: Work) -> None:
    config = modelled_config(stages=4, **SMALL)
    with LocalSystem(config) as system, system.client() as client, system.client() as watcher:
        system.wait_ready(watcher)
        batch = Background(lambda: work.run(client))
        for victim, share in (("stage-2", 0.2), ("kv-daemon", 0.5)):
            least = share * work.num_outputs
            wait_for(watcher, lambda s, least=least: s.generation_tokens > least)
            system.kill(victim)
            system.start(victim)
        assert batch.outcome() == work.expected
        status = watcher.status()
        assert status.epoch == 3
        assert status.device_blocks_used == 0


def test_a_daemon_that_brings_a_wrong_block_is_noticed(work: Work) -> None:
    config = modelled_config(stages=2, **SMALL)
    with LocalSystem(config) as system, system.client() as client:
        system.kill("kv-daemon")
        body = "support.modelled_system:daemon_with_wrong_blocks"
        system.processes["kv-daemon"] = start_process("kv-daemon", body, system.run_dir)
        system.wait_ready(client)
        Background(lambda: work.run(client))
        stages = [system.processes[f"stage-{stage}"] for stage in range(2)]
        assert eventually(lambda: any(not stage.is_alive() for stage in stages), 30)
        failed = next(index for index, stage in enumerate(stages) if not stage.is_alive())
        assert stages[failed].exitcode == EXIT_FATAL
        reason = error_file(system.run_dir, f"stage-{failed}").read_text()
        assert reason.startswith(f"stage {failed}, step ")
        assert "device block" in reason
