"""An artificial delay of 50 ms in one place of a real system is told as the cause, by its place and
its state, and as no other. What is compared are places of one run, never times with the clock."""

import random
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import Client, SamplingParams, Submit
from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.ingest import Status
from pipemax.services.bottleneck import ELSEWHERE, bottleneck
from support.command import eventually
from support.forkserver import start_process
from support.local_system import LocalSystem, small_config
from support.model_zoo import build_model
from support.modelled_system import modelled_config
from support.slow_bodies import DELAY_S, SLOW_LINK

STAGES = 3
STEPS = 40
"""Looked at: two seconds of delays."""
WIDE = {"device_blocks": 2000, "host_blocks": 0}
"""No KV travels."""
NARROW = {"device_blocks": 60, "host_blocks": 2000, "policy": "oldest-first"}
"""KV travels for nearly every step."""


class SlowSystem(LocalSystem):
    """`slow`: bodies of support.slow_bodies, by process."""

    def __init__(self, config: EngineConfig, slow: dict[str, str]) -> None:
        super().__init__(config)
        self._slow = slow

    def start(self, name: str) -> None:
        body = self._slow.get(name)
        if body is None:
            super().start(name)
            return
        index = int(name.rpartition("-")[2]) if name[-1].isdigit() else 0
        path = f"support.slow_bodies:{body}"
        self.processes[name] = start_process(name, path, self.run_dir, index)


def keep_busy(client: Client, **sampling: Any) -> None:
    endless = SamplingParams(max_tokens=200, ignore_eos=True, **sampling)
    draw = random.Random(3)
    for _ in range(60):
        ids = tuple(draw.randrange(3, 500) for _ in range(draw.randrange(20, 60)))
        request_id = client.new_request_id()
        client.submit(Submit(request_id=request_id, prompt_token_ids=ids, sampling=endless))


def two_looks(
    system: LocalSystem, *, loads: bool = False, **sampling: Any
) -> tuple[Status, Status]:
    """At a system at work, some steps apart on its last stage. `loads`: KV travels already."""
    with system.client() as worker, system.client() as watcher:
        system.wait_ready(watcher)
        keep_busy(worker, **sampling)

        def steps() -> int:
            return watcher.status().stages[-1].steps

        assert eventually(lambda: steps() > 10, 60)
        assert eventually(lambda: not loads or watcher.status().load_bytes > 0, 60)
        before = watcher.status()
        assert eventually(lambda: steps() > before.stages[-1].steps + STEPS, 60)
        return before, watcher.status()


def own_seconds(before: Status, after: Status) -> dict[tuple[int, str], float]:
    """What each stage spent on each state whose cause is its own."""
    return {
        (now.stage, state): seconds - then.state_seconds.get(state, 0.0)
        for now, then in zip(after.stages, before.stages, strict=True)
        for state, seconds in now.state_seconds.items()
        if state not in ELSEWHERE
    }


def most_of(found: dict[tuple[int, str], float]) -> tuple[int, str]:
    return max(found, key=lambda place: found[place])


def place_of(before: Status, after: Status) -> tuple[str, str]:
    """Where the others wait, and in which state, as users are told."""
    found = bottleneck(before, after)
    assert found is not None
    return found.where, found.state


def test_a_slow_stage() -> None:
    config = modelled_config(stages=STAGES, **WIDE)
    with SlowSystem(config, {"stage-1": "stage"}) as system:
        before, after = two_looks(system)
    assert place_of(before, after) == ("stage 1", "compute")
    spent = own_seconds(before, after)
    assert most_of(spent) == (1, "compute")
    assert spent[1, "compute"] >= (STEPS - 1) * DELAY_S


def test_a_slow_link() -> None:
    config = modelled_config(stages=STAGES, **NARROW)
    with SlowSystem(config, {"kv-daemon": "kv_daemon"}) as system:
        before, after = two_looks(system, loads=True)
    assert place_of(before, after) == (f"stage {SLOW_LINK}", "wait_kv")
    assert most_of(own_seconds(before, after)) == (SLOW_LINK, "wait_kv")


def test_a_slow_hop() -> None:
    config = modelled_config(stages=STAGES, **WIDE)
    with SlowSystem(config, {"stage-0": "hop"}) as system:
        before, after = two_looks(system)
    assert place_of(before, after) == ("stage 0 to stage 1", "wait_activation")


def test_a_slow_coordinator() -> None:
    config = modelled_config(stages=STAGES, **WIDE)
    with SlowSystem(config, {"coordinator": "coordinator"}) as system:
        before, after = two_looks(system)
    assert place_of(before, after) == ("coordinator", "busy")
    assert after.coordinator_busy_seconds - before.coordinator_busy_seconds >= STEPS * DELAY_S / 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("llama"))


def test_a_slow_sampler(model_dir: Path) -> None:
    config = small_config(model_dir, stages=2, device_blocks=500, sampler_workers=1)
    with SlowSystem(config, {"sampler-0": "sampler"}) as system:
        before, after = two_looks(system, temperature=1.0)
    assert place_of(before, after) == ("sampler 0", "sample")
