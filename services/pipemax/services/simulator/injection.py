"""Carries out faults: what breaks, and what the launcher and the processes then do."""

from typing import Protocol

from pipemax.services.simulator.daemon import ModelledDaemon
from pipemax.services.simulator.engine import EventLoop, to_ns
from pipemax.services.simulator.faults import DAEMON_INDEX, Fault
from pipemax.services.simulator.links import Link
from pipemax.services.simulator.stage import ModelledStage

LAST_WORDS_S = 0.02
"""How long a process that dies by `lost-message` has sent nothing that arrives."""
TICK_S = 0.5
"""Between a stage's Hellos, as in its shell."""


class Target(Protocol):
    """What can break."""

    loop: EventLoop
    stages: list[ModelledStage]
    daemon: ModelledDaemon
    links: list[Link]
    muted: set[int]
    """Stages, or the daemon, whose messages get nowhere."""
    repeating: set[int]
    """Stages that say agreements again just before they are answered."""

    def start_stage(self, stage: ModelledStage) -> None: ...

    def start_daemon(self) -> None: ...

    def say_hello_again(self, stage: ModelledStage) -> None: ...


def begin(world: Target, fault: Fault) -> None:
    """The fault strikes now; it ends by itself."""
    index = fault.stage
    match fault.kind:
        case "crash-stage" | "crash-daemon":
            _crash(world, fault)
            return
        case "lost-message":
            world.muted.add(index)
            world.loop.after(to_ns(LAST_WORDS_S), _crash, world, fault)
            return
        case "late-message":
            sleeper = world.daemon if index == DAEMON_INDEX else world.stages[index]
            until_ns = world.loop.now_ns + to_ns(fault.lasts_s)
            sleeper.awake_ns = max(sleeper.awake_ns, until_ns)
            return
        case "duplicate-message":
            world.repeating.add(index)
            _say_hello_again(world, world.stages[index])
        case "slow-link":
            world.links[index].speed = fault.factor
        case "slow-stage":
            world.stages[index].speed = fault.factor
    world.loop.after(to_ns(fault.lasts_s), _end, world, fault)


def _end(world: Target, fault: Fault) -> None:
    match fault.kind:
        case "duplicate-message":
            world.repeating.discard(fault.stage)
        case "slow-link":
            world.links[fault.stage].speed = 1.0
        case "slow-stage":
            world.stages[fault.stage].speed = 1.0


def _crash(world: Target, fault: Fault) -> None:
    if fault.stage == DAEMON_INDEX:
        world.daemon.crash()
    else:
        world.stages[fault.stage].crash()
    world.muted.discard(fault.stage)
    world.loop.after(to_ns(fault.lasts_s), _restart, world, fault)


def _restart(world: Target, fault: Fault) -> None:
    if fault.stage == DAEMON_INDEX:
        if not world.daemon.alive:
            world.daemon.restart()
            world.start_daemon()
        return
    stage = world.stages[fault.stage]
    if not stage.alive:
        stage.restart()
        world.start_stage(stage)


def _say_hello_again(world: Target, stage: ModelledStage) -> None:
    """Also without this fault, at every tick; nothing comes of it but a Welcome."""
    if stage.index in world.repeating:
        world.say_hello_again(stage)
        world.loop.after(to_ns(TICK_S), _say_hello_again, world, stage)
