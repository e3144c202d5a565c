"""Processes killed in the middle of a batch on a GPU: the same tokens, attached again, and no GPU
memory held by anybody who is gone."""

import time
from collections.abc import Callable
from functools import partial

import gpu_device
import pytest
import torch

from pipemax.client import Client
from pipemax.proto.messages.ingest import Status
from support.background import Background
from support.forkserver import stop_process
from support.gpu_systems import Way, Work, gpu_config, gpu_system, make_work
from support.local_system import LocalSystem, greedy, tokens_of
from support.model_zoo import build_model

DEADLINE_S = 60.0
_SIZES = {"device_blocks": 40, "max_num_batched_tokens": 128, "max_num_seqs": 32}
MORE_MIB = 64.0
"""What may differ in GPU memory of the same processes: libraries' workspaces, rounding."""

CASES = (
    (("stage-0",), Way(2, "ipc", "stage")),
    (("kv-daemon",), Way(2, "ipc", "stage")),
    (("kv-daemon",), Way(2, "shm", "daemon")),
    (("stage-1", "kv-daemon"), Way(2, "ipc", "daemon")),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Work:
    model_dir = build_model("llama", tmp_path_factory.mktemp("llama"))
    return make_work(model_dir, device, "crash", count=20, longest=200, output=110)


@pytest.mark.parametrize(("victims", "way"), CASES, ids=str)
def test_killed_in_the_middle(
    work: Work, victims: tuple[str, ...], way: Way, rehearsal: bool, figure: Callable[..., None]
) -> None:
    config = gpu_config(work.model_dir, way, rehearsal=rehearsal, **_SIZES)
    idle_mib = used_mib(None)
    system = gpu_system(config, rehearsal=rehearsal)
    with system, system.client() as client, system.client() as watcher:
        system.wait_ready(watcher)
        batch = Background(
            lambda: client.generate(work.prompts, [greedy(count) for count in work.outputs])
        )
        total = sum(len(answer) for answer in work.expected)
        before = wait_for(watcher, lambda status: status.generation_tokens > 0.4 * total)
        running_mib = used_mib(system)
        killed_s = time.monotonic()
        for name in victims:
            system.kill(name)
        for name in victims:
            system.start(name)
        again = wait_for(watcher, lambda status: is_back(status, before), partial(revive, system))
        back_s = time.monotonic() - killed_s
        completions = batch.outcome()
        after = watcher.status()
        again_mib = settled_mib(system, running_mib)
    assert isinstance(completions, list)
    assert tokens_of(completions) == work.expected
    assert again.epoch > before.epoch
    assert after.device_blocks_used == 0
    if "kv-daemon" not in victims:  # what was stored was loaded again, not computed again
        stored_tokens = before.host_blocks_used * config.block_size
        assert stored_tokens > 0
        assert after.recomputed_tokens - before.recomputed_tokens < stored_tokens / 2
    stopped_mib = settled_mib(system, idle_mib)
    killed = f"{' and '.join(victims)} killed, {way}"
    figure(f"{killed}: tokens again after", back_s, "s")
    figure(f"{killed}: GPU memory held after recovery", again_mib - running_mib, "MiB",
           at_most=MORE_MIB)  # fmt: skip
    figure(f"{killed}: GPU memory held after the end", stopped_mib - idle_mib, "MiB",
           at_most=MORE_MIB)  # fmt: skip
    assert again_mib <= running_mib + MORE_MIB
    assert stopped_mib <= idle_mib + MORE_MIB


def is_back(status: Status, before: Status) -> bool:
    return (
        status.phase == "ready"
        and status.epoch > before.epoch
        and status.generation_tokens > before.generation_tokens
    )


def revive(system: LocalSystem) -> None:
    """As the launcher does: starts what has left by itself. A stage whose steps wait for a process
    that is gone does so."""
    for name, process in list(system.processes.items()):
        if not process.is_alive():
            stop_process(system.processes.pop(name))
            system.start(name)


def wait_for(
    client: Client, condition: Callable[[Status], bool], meanwhile: Callable[[], None] | None = None
) -> Status:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition(status := client.status()):
        assert time.monotonic() < deadline_s, status
        if meanwhile is not None:
            meanwhile()
        time.sleep(0.005)
    return status


def used_mib(system: LocalSystem | None) -> float:
    """Of the GPU's memory, by all processes together. In a rehearsal, of the simulated GPU's, which
    its system brings; without a system the real one's, or none."""
    if system is not None and system.machine is not None:
        return system.machine.held_bytes(0) / 2**20
    used = gpu_device.used_mib(gpu_device.chosen())
    assert used is not None or not torch.cuda.is_available(), "nvidia-smi does not say it"
    return used or 0.0


def settled_mib(system: LocalSystem, wanted_mib: float) -> float:
    """Gives the driver a moment to free what the dead held."""
    deadline_s = time.monotonic() + 5.0
    while (used := used_mib(system)) > wanted_mib + MORE_MIB and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return used
