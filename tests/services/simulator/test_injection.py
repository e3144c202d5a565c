"""Lost, late and repeated messages: what they do, and that everything still finishes."""

import random
from dataclasses import replace
from functools import cache

import pytest

from pipemax.services.simulator.engine import to_ns
from pipemax.services.simulator.faults import parse_fault
from pipemax.services.simulator.injection import LAST_WORDS_S
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import SimulationSpec, Timing
from pipemax.services.simulator.workload import lognormal
from pipemax.services.simulator.world import World
from pipemax.stage_worker.modelled.catalogue import load_catalogue

CATALOGUE = load_catalogue()


def make(*faults: str, **changes: object) -> SimulationSpec:
    spec = SimulationSpec(
        policy="oldest-first",  # it always needs the daemon
        gpu=CATALOGUE.gpu("rtx-3090"),
        num_gpus=3,
        model=CATALOGUE.model("mixtral-8x7b"),
        workload=lognormal("test", 120, 40, 10, seed=1, sigma=0.5),
        weight_element_bytes=0.5,
        block_size=16,
        device_blocks=40,
        host_bytes=20 * 10**9,
        max_num_batched_tokens=256,
        timing=Timing(load_s=0.2),
        faults=tuple(parse_fault(text, 3) for text in faults),
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def run(spec: SimulationSpec) -> tuple[World, Result]:
    world = World(spec, check_every=40)
    result = world.run()
    expected = {key: r.output_tokens for key, r in enumerate(spec.workload.requests)}
    assert result.outputs == expected
    world.coordinator.scheduler.check_invariants()
    assert not world.coordinator.scheduler.state.running
    return world, result


@cache
def undisturbed_s() -> float:
    return run(make())[1].simulated_s


@pytest.mark.parametrize(
    "faults",
    [
        ("lost-message:1@0.5+0.2",),
        ("lost-message:2@0.4+0.1", "lost-message:0@0.9+0.1"),
        ("lost-message@0.5+0.2",),
        ("late-message:0@0.5+0.3",),
        ("late-message:1@0.4+0.6", "crash-stage:2@0.5+0.1"),
        ("late-message@0.4+0.5", "crash-stage:0@0.5+0.1"),
        ("late-message:2@0.4+0.8", "crash-daemon@0.5+0.1", "crash-stage:0@0.75+0.05"),
        ("duplicate-message:1@0.1+9", "duplicate-message:2@0.1+9", "crash-stage:0@0.5+0.1"),
        ("duplicate-message:0@0.1+9", "crash-daemon@0.5+0.1", "late-message:1@0.6+0.5"),
    ],
)
def test_everything_finishes(faults: tuple[str, ...]) -> None:
    _, result = run(make(*faults))
    assert result.simulated_s > undisturbed_s() + 0.05


def test_random_faults_at_random_times() -> None:
    draw = random.Random(5)
    for seed in range(4):
        faults = []
        for _ in range(4):
            stage = draw.choice(["", ":0", ":1", ":2"])
            kinds = ["lost-message", "late-message"]
            kinds += ["crash-stage", "duplicate-message"] if stage else ["crash-daemon"]
            at_s, lasts_s = draw.uniform(0.05, 1.2), draw.uniform(0.01, 0.6)
            faults.append(f"{draw.choice(kinds)}{stage}@{at_s:.3f}+{lasts_s:.3f}")
        workload = lognormal("test", 60, 30, 8, seed=seed, sigma=0.7)
        run(make(*faults, workload=workload, seed=seed))


def test_the_last_words_of_a_stage_are_lost_and_its_activations_are_not() -> None:
    world = World(make("lost-message:1@0.5+0.2"))
    told: list[int] = []
    arrived: list[int] = []
    silent_ns = range(to_ns(0.5) + to_ns(50e-6), to_ns(0.5 + LAST_WORDS_S))
    step_done, add_rows = world.coordinator.step_done, world.stages[2].add_rows

    def hear(epoch: int, stage: int, *rest: object) -> None:
        if world.loop.now_ns in silent_ns and stage == 1:
            told.append(world.loop.now_ns)
        step_done(epoch, stage, *rest)  # type: ignore[arg-type]

    def see(epoch: int, step: int) -> None:
        if world.loop.now_ns in silent_ns:
            arrived.append(step)
        add_rows(epoch, step)

    world.coordinator.step_done = hear  # type: ignore[method-assign]
    world.stages[2].add_rows = see  # type: ignore[method-assign]
    world.run()
    assert not told
    assert arrived


def test_a_sleeping_stage_does_nothing_and_then_all_it_missed() -> None:
    world = World(make("late-message:1@0.5+0.4"))
    seen: list[int] = []
    add_plan = world.stages[1].add_plan

    def hear(planned: object) -> None:
        seen.append(world.loop.now_ns)
        add_plan(planned)  # type: ignore[arg-type]

    world.stages[1].add_plan = hear  # type: ignore[method-assign]
    world.run()
    assert not [at for at in seen if to_ns(0.5) < at < to_ns(0.9)]
    assert to_ns(0.9) in seen


def test_repeated_agreements_are_made_twice() -> None:
    world = World(make("duplicate-message:1@0.1+9"))
    offers: list[int] = []
    hellos: list[str] = []
    attach, hello = world._attach, world.coordinator.hello

    def offered(offer: object) -> None:
        offers.append(offer.stage)  # type: ignore[attr-defined]
        attach(offer)  # type: ignore[arg-type]

    def greeted(name: str, message: object) -> None:
        hellos.append(name)
        hello(name, message)  # type: ignore[arg-type]

    world._attach = offered  # type: ignore[method-assign]
    world.coordinator.hello = greeted  # type: ignore[method-assign]
    world.run()
    assert [offers.count(stage) for stage in range(3)] == [1, 2, 1]
    assert hellos.count("stage-1") > 2 == 2 * hellos.count("stage-0")
