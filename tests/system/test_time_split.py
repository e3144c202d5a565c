"""Every second of a stage belongs to one state: the states sum to wall time, in the real system."""

from pathlib import Path

import pytest

from pipemax.client import Client, SamplingParams, Submit
from pipemax.proto.messages.ingest import Status
from support.command import eventually
from support.local_system import LocalSystem, small_config
from support.model_zoo import build_model

STATES = {"compute", "wait_plan", "wait_activation", "wait_kv", "prepare", "send"}
SPAN_S = 3.0
TOLERANCE = 0.01


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("llama"))


def keep_busy(client: Client) -> None:
    endless = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    for _ in range(40):
        request_id = client.new_request_id()
        client.submit(Submit(request_id=request_id, prompt_token_ids=(5, 6), sampling=endless))


def accounted(status: Status, stage: int) -> float:
    return sum(status.stages[stage].state_seconds.values())


def test_states_sum_to_wall_time(model_dir: Path) -> None:
    """Both ends are read from the coordinator's clock while steps report every few milliseconds;
    what is left of the difference is the age of the last report."""
    config = small_config(model_dir, stages=2, device_blocks=40)
    with LocalSystem(config) as system, system.client() as client, system.client() as watcher:
        system.wait_ready(watcher)
        keep_busy(client)
        assert eventually(lambda: watcher.status().generation_tokens > 100, 30)
        first = watcher.status()
        assert eventually(lambda: watcher.status().uptime_s - first.uptime_s > SPAN_S, 30)
        last = watcher.status()
        assert last.requests_running
    wall = last.uptime_s - first.uptime_s
    for stage in range(2):
        assert set(last.stages[stage].state_seconds) == STATES
        assert last.stages[stage].steps > first.stages[stage].steps
        split = accounted(last, stage) - accounted(first, stage)
        assert split == pytest.approx(wall, rel=TOLERANCE), (split, wall)
