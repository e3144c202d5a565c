"""The whole system on simulated GPUs, whose operations come late at random: what waits for no event
gives wrong tokens. Attention is plain torch; the rest is what runs on a real GPU."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import Client
from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.ingest import Status
from support.background import Background
from support.fake_cuda import FakeMachine
from support.fake_cuda.bodies import blocking_calls
from support.fake_cuda.process import BlockingCall
from support.local_system import LocalSystem, cuda_config, greedy, tokens_of
from support.model_zoo import build_model, reference_tokens

STATES = {"compute", "wait_plan", "wait_activation", "wait_kv", "prepare", "send"}
BLOCK = 8
REPORT_AGE_S = 0.2
"""A stage reports whenever a step ends, which on a busy machine may take this long."""


@dataclass(frozen=True)
class Work:
    model_dir: Path
    prompts: list[list[int]]
    counts: list[int]
    expected: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.expected))

    @property
    def blocks(self) -> int:
        """All contexts at their longest."""
        lengths = [len(p) + n for p, n in zip(self.prompts, self.counts, strict=True)]
        return sum(-(-length // BLOCK) for length in lengths)


@dataclass(frozen=True)
class Way:
    """How stages work together."""

    gpus: tuple[int, ...] = (0, 0)
    copies: str = "stage"
    transport: str = "ipc"
    enforce_eager: bool = False

    def __str__(self) -> str:
        eager = "-eager" if self.enforce_eager else ""
        return f"{''.join(map(str, self.gpus))}-{self.copies}-{self.transport}{eager}"

    def config(self, work: Work, **settings: Any) -> EngineConfig:
        """With a device pool of a third of the working set."""
        return cuda_config(
            work.model_dir,
            gpus=self.gpus,
            cuda={"kv_copies": self.copies, "enforce_eager": self.enforce_eager},
            activation_transport=self.transport,
            block_size=BLOCK,
            device_blocks=work.blocks // 3,
            host_blocks=2 * work.blocks,
            max_model_len=256,
            max_num_batched_tokens=128,
            max_num_seqs=16,
            **settings,
        )

    @property
    def transports(self) -> list[str]:
        """By stage, on MACHINE."""
        pairs = [self.transport] * (len(self.gpus) - 1)
        if self.transport == "auto":
            pairs = [
                "shm" if 2 in pair and pair != (2, 2) else "ipc" for pair in pairwise(self.gpus)
            ]
        ends = [pairs[max(0, i - 1) : i + 1] for i in range(len(self.gpus))]
        return [", ".join(dict.fromkeys(end)) for end in ends]


MACHINE = FakeMachine(num_gpus=3, peers=((0, 1),), delay_s=0.001)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    model_dir = build_model("llama", tmp_path_factory.mktemp("llama"))
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 512) for _ in range(draw.randrange(1, 120))] for _ in range(14)]
    for prompt in prompts[::3]:  # these share blocks
        prompt[:50] = prompts[1][: min(50, len(prompt))]
    counts = [draw.randrange(8, 48) for _ in prompts]
    return Work(model_dir, prompts, counts, reference_tokens(model_dir, prompts, counts))


DAILY = (
    Way((0, 0), "stage", "ipc"),
    Way((0, 1, 2), "daemon", "auto", enforce_eager=True),
)
FULL = (
    Way((0, 2), "daemon", "auto"),
    Way((0, 1, 1), "stage", "auto", enforce_eager=True),
    Way((0, 1), "daemon", "auto"),
    Way((0, 0, 2), "stage", "auto", enforce_eager=True),
    *itertools.starmap(
        Way,
        itertools.product(((0, 0), (0, 0, 0)), ("stage", "daemon"), ("ipc", "shm"), (False, True)),
    ),
)


def params(daily: Sequence[Any], full: Sequence[Any]) -> list[Any]:
    rest = [value for value in full if value not in daily]
    return [*daily, *(pytest.param(value, marks=pytest.mark.full) for value in rest)]


def generate(client: Client, work: Work) -> list[list[int]]:
    return tokens_of(client.generate(work.prompts, [greedy(n) for n in work.counts]))


def held_bytes(system: LocalSystem) -> int:
    """Device memory that processes hold."""
    assert system.machine is not None
    return sum(map(system.machine.held_bytes, range(system.machine.num_gpus)))


def wait_for(client: Client, condition: Callable[[Status], bool]) -> Status:
    deadline = time.monotonic() + 60
    while not condition(status := client.status()):
        assert time.monotonic() < deadline, status
        time.sleep(0.01)
    return status


def has_produced(tokens: float, status: Status) -> bool:
    return status.generation_tokens >= tokens


@pytest.mark.parametrize("way", params(DAILY, FULL), ids=str)
def test_tokens_equal_transformers(work: Work, way: Way) -> None:
    """And between the first tokens and the last, no work loop waits for a GPU, and every second of
    a stage has one state."""
    with LocalSystem(way.config(work), MACHINE) as system, system.client() as client:
        system.wait_ready(client)
        busy = Background(lambda: watch(client, 0.05 * work.num_tokens, 0.8 * work.num_tokens))
        with system.client() as user:
            tokens = generate(user, work)
        moments = busy.outcome()
        status = client.status()
    assert tokens == work.expected
    assert ("CUDA graphs for" in system.log("stage-0")) != way.enforce_eager
    assert status.epoch == 1
    assert status.load_bytes > 0
    assert status.decode_prefetched_tokens > 0
    assert [stage.activation_transport for stage in status.stages] == way.transports
    assert isinstance(moments, tuple)
    check_states(*moments)
    assert waits_of_work_loops(system, *moments) == []
    assert held_bytes(system) == 0


@dataclass(frozen=True)
class Moment:
    at_s: float
    status: Status


def watch(client: Client, first: float, last: float) -> tuple[Moment, Moment]:
    """When that many tokens were there."""
    early = wait_for(client, partial(has_produced, first))
    begin = Moment(time.monotonic(), early)
    late = wait_for(client, partial(has_produced, last))
    return begin, Moment(time.monotonic(), late)


def check_states(begin: Moment, end: Moment) -> None:
    """They sum to wall time, but for the age of each stage's last report."""
    wall_s = end.status.uptime_s - begin.status.uptime_s
    for before, after in zip(begin.status.stages, end.status.stages, strict=True):
        assert set(after.state_seconds) == STATES
        spent_s = sum(after.state_seconds.values()) - sum(before.state_seconds.values())
        assert spent_s == pytest.approx(wall_s, rel=0.02, abs=REPORT_AGE_S)
        assert after.state_seconds["compute"] > before.state_seconds["compute"]


def waits_of_work_loops(
    system: LocalSystem, begin: Moment, end: Moment
) -> list[tuple[str, BlockingCall]]:
    stages = range(system.config.pipeline_parallel_size)
    return [
        (name, call)
        for name in ("kv-daemon", *(f"stage-{i}" for i in stages))
        for call in blocking_calls(system.run_dir, name)
        if call.thread == "MainThread" and begin.at_s < call.at_s < end.at_s
    ]


CRASHES = (
    (Way((0, 0), "daemon", "ipc"), "stage-0"),
    (Way((0, 0), "stage", "shm"), "kv-daemon"),
)
ALL_CRASHES = tuple(
    (Way((0, 0), copies, transport), victims)
    for copies in ("stage", "daemon")
    for transport in ("ipc", "shm")
    for victims in ("stage-0", "stage-1", "kv-daemon", "stage-1 kv-daemon")
)


@pytest.mark.parametrize(
    "crash", params(CRASHES, ALL_CRASHES), ids=lambda crash: f"{crash[0]} {crash[1]}"
)
def test_killed_in_mid_batch(work: Work, crash: tuple[Way, str]) -> None:
    """The batch ends with the same tokens, and of the dead no GPU memory is left."""
    way, victims = crash[0], crash[1].split()
    with (
        LocalSystem(way.config(work), MACHINE) as system,
        system.client() as client,
        system.client() as watcher,
    ):
        system.wait_ready(watcher)
        held = held_bytes(system)
        batch = Background(lambda: generate(client, work))
        wait_for(watcher, partial(has_produced, 0.3 * work.num_tokens))
        for name in victims:
            system.kill(name)
        for name in victims:
            system.start(name)
        while batch.is_alive():  # who waits for what a dead process was to record dies as well
            system.revive()
            time.sleep(0.05)
        assert batch.outcome() == work.expected
        assert watcher.status().epoch >= 2
        assert held_bytes(system) == held
    assert held_bytes(system) == 0
