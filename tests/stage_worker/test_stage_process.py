"""Whole stage processes with a small Llama, driven by a coordinator and a daemon of the test."""

import contextlib
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from pipemax.proto.config import EngineConfig, save_config
from pipemax.proto.geometry import blocks_for
from pipemax.proto.memory import SharedMemory
from pipemax.proto.messages.control import (
    Beat,
    Failure,
    Hello,
    Reset,
    StageReady,
    StepDone,
    StepPlan,
    Stop,
)
from pipemax.proto.messages.kv import AttachPool, Computed, Loaded
from pipemax.proto.messages.types import pack_i32, unpack_i32
from pipemax.proto.process import EXIT_FATAL, error_file
from pipemax.stage_worker.channels.keys import create_activation_keys
from support.fake_peers import FakePeers
from support.forkserver import log_of, start_process, stop_process
from support.model_zoo import EOS_TOKEN_ID, build_model, reference_tokens
from support.step_plans import greedy_row

BODY = "pipemax.stage_worker.main:body"
BLOCK_SIZE = 8
OUTPUT_TOKENS = 12
PROMPTS = [list(range(3, 40)), list(range(100, 109))]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    answers = reference_tokens(model_dir, PROMPTS, [OUTPUT_TOKENS] * len(PROMPTS))
    assert all(len(answer) > OUTPUT_TOKENS // 2 for answer in answers), "a test of almost nothing"
    return answers


class System:
    """Two stages and the fakes around them."""

    def __init__(
        self,
        run_dir: Path,
        model_dir: Path,
        *,
        transport: Literal["shm", "tcp"] = "shm",
        pool_bytes: int = 2**20,
        warm_up_s: float = 0.0,
        pin_cores: bool = False,
        spin_wait_s: float = 0.0,
    ) -> None:
        self.run_dir = run_dir
        config = EngineConfig(
            model=str(model_dir),
            served_model_name="llama",
            pipeline_parallel_size=2,
            layer_split=(2, 2),
            max_model_len=128,
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=pool_bytes,
            max_num_batched_tokens=64,
            activation_transport=transport,
            warm_up_s=warm_up_s,
            pin_cores=pin_cores,
            spin_wait_s=spin_wait_s,
        )
        save_config(config, run_dir)
        if transport == "tcp":
            create_activation_keys(run_dir)
        self.peers = FakePeers(run_dir)
        self.stages = [self.start(stage) for stage in range(2)]

    def start(self, stage: int) -> ForkServerProcess:
        return start_process(f"stage-{stage}", BODY, self.run_dir, stage)

    def kill(self, stage: int) -> None:
        self.stages[stage].kill()
        self.stages[stage].join()
        self.stages[stage].close()

    def close(self) -> None:
        for stage in self.stages:
            with contextlib.suppress(ValueError):  # closed already
                stop_process(stage)
        self.peers.close()


@pytest.fixture
def system(runtime_dir: Path, model_dir: Path) -> Iterator[System]:
    system = System(runtime_dir, model_dir)
    yield system
    system.close()


class Generation:
    """Plays the coordinator for PROMPTS: one step at a time, all requests in it."""

    def __init__(self, peers: FakePeers, epoch: int, first_step: int = 0) -> None:
        self.peers = peers
        self.epoch = epoch
        self.step = first_step
        self.tokens = [list(prompt) for prompt in PROMPTS]
        self.computed = [0] * len(PROMPTS)

    @property
    def outputs(self) -> list[list[int]]:
        return [tokens[len(prompt) :] for tokens, prompt in zip(self.tokens, PROMPTS, strict=True)]

    def plan(self, *, most: int = 20, wait_for_load: bool = False) -> StepPlan:
        """Up to `most` tokens that are not in the KV cache yet, for each request that goes on."""
        items = [i for i, done in enumerate(self.outputs) if not self._is_finished(done)]
        new = [self.tokens[i][self.computed[i] :][:most] for i in items]
        contexts = [self.computed[i] for i in items]
        blocks = [
            range(16 * i, 16 * i + blocks_for(context + len(tokens), BLOCK_SIZE))
            for i, context, tokens in zip(items, contexts, new, strict=True)
        ]
        self.sampled = [
            (row, i)
            for row, (i, tokens) in enumerate(zip(items, new, strict=True))
            if self.computed[i] + len(tokens) == len(self.tokens[i])
        ]
        for i, tokens in zip(items, new, strict=True):
            self.computed[i] += len(tokens)
        plan = StepPlan(
            epoch=self.epoch,
            step=self.step,
            slot=self.step % 2,
            wait_for_load=wait_for_load,
            num_tokens=pack_i32(map(len, new)),
            context_lens=pack_i32(contexts),
            block_counts=pack_i32(map(len, blocks)),
            block_tables=pack_i32(block for run in blocks for block in run),
            token_ids=pack_i32(token for tokens in new for token in tokens),
            sample=tuple(greedy_row(row) for row, _ in self.sampled),
        )
        self.step += 1
        return plan

    def advance(self, *, wait_for_load: bool = False) -> list[StepDone]:
        """One step through both stages; each one's StepDone."""
        plan = self.plan(wait_for_load=wait_for_load)
        for stage in range(2):
            self.peers.tell(stage, plan)
            if wait_for_load:
                self.peers.tell_from_daemon(stage, Loaded(epoch=plan.epoch, step=plan.step))
        done = [self.peers.take(stage, StepDone) for stage in range(2)]
        for stage, message in enumerate(done):
            assert (message.epoch, message.step, message.stage) == (plan.epoch, plan.step, stage)
            assert self.peers.take(stage, Computed).step == plan.step
        assert done[0].tokens is None
        assert done[1].tokens is not None
        tokens = unpack_i32(done[1].tokens)
        for (_, i), token in zip(self.sampled, tokens, strict=True):
            self.tokens[i].append(token)
        return done

    @property
    def finished(self) -> bool:
        return all(map(self._is_finished, self.outputs))

    @staticmethod
    def _is_finished(output: list[int]) -> bool:
        return len(output) == OUTPUT_TOKENS or EOS_TOKEN_ID in output


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_tokens_are_those_of_transformers(
    runtime_dir: Path,
    model_dir: Path,
    expected: list[list[int]],
    transport: Literal["shm", "tcp"],
) -> None:
    with contextlib.closing(System(runtime_dir, model_dir, transport=transport)) as system:
        ready = system.peers.bring_up(2, epoch=1)
        assert [message.layers for message in ready] == [(0, 2), (2, 4)]
        assert all(message.activation_transport == transport for message in ready)
        generation = Generation(system.peers, epoch=1)
        while not generation.finished:
            done = generation.advance(wait_for_load=generation.step % 3 == 0)
        assert generation.outputs == expected
        for message in done:
            assert message.state_seconds["compute"] >= message.compute_s > 0


def test_what_a_stage_tells_of_its_pool_and_its_time(system: System) -> None:
    ready = system.peers.bring_up(2, epoch=1)
    generation = Generation(system.peers, epoch=1)
    first = generation.advance()
    check_that_the_daemon_can_map_the_pool(system, ready)
    for _ in range(3):
        last = generation.advance()
    for early, late in zip(first, last, strict=True):
        grown = {s: late.state_seconds[s] - early.state_seconds[s] for s in early.state_seconds}
        assert min(grown.values()) >= 0
        assert grown["compute"] >= late.compute_s
    check_that_beats_come_while_nothing_happens(system)


def check_that_the_daemon_can_map_the_pool(system: System, ready: list[StageReady]) -> None:
    """After the first step."""
    for stage in range(2):
        attach = system.peers.take(stage, AttachPool)
        assert attach.num_blocks == ready[stage].num_blocks == 2**20 // ready[stage].block_bytes
        memory = SharedMemory.open(attach.handle)
        first, last = attach.block_bytes, memory.size_bytes - attach.block_bytes
        assert any(memory.buffer[:first]), "the first prompt's first block is empty"
        assert not any(memory.buffer[last:])
        memory.close()


def check_that_beats_come_while_nothing_happens(system: System) -> None:
    system.peers.said.clear()
    early, late = (system.peers.take(0, Beat).state_seconds for _ in range(2))
    assert late["wait_plan"] > early["wait_plan"]
    assert late["compute"] == early["compute"]


def test_a_killed_stage_is_replaced_and_the_batch_ends_with_the_same_tokens(
    system: System, expected: list[list[int]]
) -> None:
    system.peers.bring_up(2, epoch=1)
    generation = Generation(system.peers, epoch=1)
    for _ in range(5):
        generation.advance()
    for epoch, victim in ((2, 1), (3, 0)):
        survivor = 1 - victim
        incarnation = system.peers.take(victim, Hello).incarnation
        # The survivor is left with a step it cannot finish: a plan without activations, or one
        # whose activations nobody takes.
        void = Generation(system.peers, epoch=epoch - 1, first_step=generation.step + 100)
        system.kill(victim)
        system.peers.tell(survivor, void.plan())
        system.stages[victim] = system.start(victim)
        system.peers.take(victim, StageReady)
        assert system.peers.from_stage(victim, Hello)[-1].incarnation != incarnation
        system.peers.reset(2, epoch)
        for stage in range(2):
            system.peers.said[f"stage-{stage}".encode()].clear()
        generation.epoch = epoch
        generation.computed = [0] * len(PROMPTS)  # a new stage has no KV: recompute
        generation.advance()
        generation.advance()
    while not generation.finished:
        generation.advance()
    assert generation.outputs == expected


def test_a_reset_ends_a_wait_and_voids_its_step(system: System) -> None:
    system.peers.bring_up(2, epoch=1)
    generation = Generation(system.peers, epoch=1)
    plan = generation.plan(wait_for_load=True)
    for stage in range(2):
        system.peers.tell(stage, plan)  # and no Loaded
    while not system.peers.take(0, Beat).state_seconds.get("wait_kv"):
        pass  # it has not come to the plan yet
    system.peers.reset(2, 2)
    again = Generation(system.peers, epoch=2)
    done = again.advance()
    assert done[0].state_seconds["wait_kv"] > 0
    assert system.peers.from_stage(0, StepDone) == []


def test_a_new_coordinator_is_told_everything_again(system: System) -> None:
    system.peers.bring_up(2, epoch=7)
    system.peers.close()
    system.peers = FakePeers(system.run_dir, instance_id="second")
    system.peers.bring_up(2, epoch=1)  # epochs count anew
    assert Generation(system.peers, epoch=1).advance()[1].tokens is not None


def test_a_late_daemon_is_asked_again(system: System) -> None:
    for stage in range(2):
        system.peers.take(stage, StageReady)
        system.peers.attaches_pools = False
        system.peers.tell(stage, Reset(epoch=1))
    for stage in range(2):
        first, second = (system.peers.take(stage, AttachPool) for _ in range(2))
        assert first == second
    system.peers.attaches_pools = True
    system.peers.reset(2, 2)


@pytest.mark.parametrize("how", ["stop", "sigterm"])
def test_a_stage_leaves_when_told_to(system: System, how: str) -> None:
    system.peers.bring_up(2, epoch=1)
    generation = Generation(system.peers, epoch=1)
    system.peers.tell(1, generation.plan())  # it waits for activations that never come
    system.peers.take(1, Beat)
    for stage, process in enumerate(system.stages):
        if how == "stop":
            system.peers.tell(stage, Stop())
            process.join(20)
        assert stop_process(process) == 0, log_of(system.run_dir, f"stage-{stage}")


def test_a_stage_that_loads_leaves_on_sigterm(system: System) -> None:
    for stage, process in enumerate(system.stages):
        system.peers.take(stage, Hello)  # which it sends before it loads
        assert stop_process(process) == 0, log_of(system.run_dir, f"stage-{stage}")


def test_a_step_that_cannot_be_computed_ends_the_process_for_a_restart(system: System) -> None:
    system.peers.bring_up(2, epoch=1)
    plan = Generation(system.peers, epoch=1).plan()
    tables = pack_i32([10**6] * (len(plan.block_tables) // 4))
    broken = msgspec.structs.replace(plan, block_tables=tables)
    system.peers.tell(0, broken)
    error = system.peers.take(0, Failure).error
    assert "uses block 1000000" in error
    assert "\n" not in error
    system.stages[0].join(20)
    assert stop_process(system.stages[0]) == 1
    assert not error_file(system.run_dir, "stage-0").exists()


def test_a_warm_up_sweep_comes_with_ready_and_changes_no_token(
    runtime_dir: Path, model_dir: Path, expected: list[list[int]]
) -> None:
    with contextlib.closing(System(runtime_dir, model_dir, warm_up_s=0.2)) as system:
        for ready in system.peers.bring_up(2, epoch=1):
            assert len(ready.sweep) >= 2
            assert any(sample.decode_requests for sample in ready.sweep)
        generation = Generation(system.peers, epoch=1)
        while not generation.finished:
            first = generation.step == 0
            done = generation.advance()
            if first:
                assert done[0].state_seconds["compute"] == done[0].compute_s  # the sweep is before
        assert generation.outputs == expected


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core for two stages")
def test_pinned_stages_that_spin_compute_the_same(
    runtime_dir: Path, model_dir: Path, expected: list[list[int]]
) -> None:
    system = System(runtime_dir, model_dir, pin_cores=True, spin_wait_s=1e-3)
    with contextlib.closing(system):
        system.peers.bring_up(2, epoch=1)
        first, second = (os.sched_getaffinity(stage.pid or 0) for stage in system.stages)
        assert len(first) == len(second) == 1
        assert first != second
        generation = Generation(system.peers, epoch=1)
        while not generation.finished:
            generation.advance()
        assert generation.outputs == expected


def test_a_pool_too_small_for_one_block_is_fatal(runtime_dir: Path, model_dir: Path) -> None:
    with contextlib.closing(System(runtime_dir, model_dir, pool_bytes=1000)) as system:
        assert "holds no KV block" in system.peers.take(0, Failure).error
        system.stages[0].join(20)
        assert stop_process(system.stages[0]) == EXIT_FATAL
        reason = error_file(runtime_dir, "stage-0").read_text()
        assert "--kv-cache-memory-bytes 1000 B holds no KV block" in reason
        assert reason.count("\n") == 1
