"""A coordinator that notes down what every step costs it, for benchmarks: it runs the shipped
process and looks over its shoulder.

    python measuring_coordinator.py OUT MOST_RUNNING [--parts] --run-dir DIR [--parent-pipe-fd N]

A step's cost is the CPU time that the whole process, ZeroMQ's threads included, spends from the
moment at which one step's tokens were dealt with to that at which the next one's were. Planning is
what the scheduling core takes for the tokens of a step and the plans that follow. Three clocks are
read for each step and two around its planning; with `--parts` many more, to say which part of the
loop's thread the time goes to, and what they cost is then part of the figures.

No more than MOST_RUNNING requests are admitted at a time. When the process ends, OUT holds a JSON
object: `names`, FACTS and the parts asked for, and `steps`, a row of them for each step.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipemax.coordinator import main as coordinator
from pipemax.coordinator import shell as shell_module
from pipemax.coordinator.admission import Admission
from pipemax.coordinator.client_desk import ClientDesk
from pipemax.coordinator.control_link import ControlLink
from pipemax.coordinator.core import Scheduler
from pipemax.coordinator.events import StageComputed, StepReturned, Submitted
from pipemax.coordinator.jobs import Jobs
from pipemax.coordinator.sessions import Sessions
from pipemax.coordinator.shell import CoordinatorShell
from pipemax.coordinator.status import StatusView
from pipemax.proto.process import process_main

FACTS = (
    "at_s", "requests", "running", "waiting", "prefetched_blocks", "answer_s", "process_cpu_s",
    "thread_cpu_s", "plan_cpu_s",
)  # fmt: skip
"""Of a step: monotonic time; its requests; all that run and wait; blocks prefetched since the step
before; wall time from its tokens' arrival to when the next plan had left; CPU time."""
PARTS = (
    "receive", "plan", "stage reports", "other events", "send", "hand out", "clients", "new",
    "journal", "results", "status", "loop",
)  # fmt: skip


class StepMeter:
    """CPU time by step."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.plan_s = self.left_s = 0.0
        self._process_s, self._thread_s = time.process_time(), time.thread_time()
        self._prefetched = 0

    def step(self, shell: CoordinatorShell, num_requests: int, arrived_s: float) -> None:
        state = shell._scheduler.state
        process_s, thread_s = time.process_time(), time.thread_time()
        prefetched = state.counters.prefetch_blocks
        self.steps.append(
            [
                time.monotonic(),
                num_requests,
                len(state.running),
                len(state.waiting),
                prefetched - self._prefetched,
                max(0.0, self.left_s - arrived_s),
                process_s - self._process_s,
                thread_s - self._thread_s,
                self.plan_s,
                *_parts.taken(),
            ]
        )
        self._process_s, self._thread_s, self._prefetched = process_s, thread_s, prefetched
        self.plan_s = 0.0


class PartMeter:
    """CPU time by part: what a part calls that is a part of its own does not count for it."""

    def __init__(self) -> None:
        self.is_on = False
        self._spent_s = dict.fromkeys(PARTS, 0.0)
        self._inside = ["loop"]
        self._since_s = time.thread_time()

    def enter(self, part: str) -> None:
        self._switch()
        self._inside.append(part)

    def leave(self) -> None:
        self._switch()
        self._inside.pop()

    def taken(self) -> list[float]:
        """Seconds by part since the last time; nothing when off."""
        if not self.is_on:
            return []
        self._switch()
        spent_s = list(self._spent_s.values())
        self._spent_s = dict.fromkeys(PARTS, 0.0)
        return spent_s

    def _switch(self) -> None:
        now_s = time.thread_time()
        self._spent_s[self._inside[-1]] += now_s - self._since_s
        self._since_s = now_s


_steps, _parts = StepMeter(), PartMeter()


def install_steps(most_running: int) -> None:
    returned, told, handle = (
        CoordinatorShell._step_returned,
        ControlLink.to_stages,
        Scheduler.handle,
    )
    has_room = Admission._has_room

    def to_stages(link: ControlLink, message: Any) -> None:
        told(link, message)
        _steps.left_s = time.monotonic()

    def step_returned(shell: CoordinatorShell, step: int, whole: Any) -> None:
        arrived_s = time.monotonic()
        returned(shell, step, whole)
        if whole is not None:
            _steps.step(shell, len(whole.tokens), arrived_s)

    def handled(scheduler: Scheduler, event: Any, now: float) -> Any:
        if type(event) is not StepReturned:
            return handle(scheduler, event, now)
        before_s = time.thread_time()
        try:
            return handle(scheduler, event, now)
        finally:
            _steps.plan_s += time.thread_time() - before_s

    def has_place(admission: Admission, request: Any) -> bool:
        return len(admission._state.running) < most_running and has_room(admission, request)

    ControlLink.to_stages = to_stages  # type: ignore[method-assign]
    CoordinatorShell._step_returned = step_returned  # type: ignore[method-assign]
    Scheduler.handle = handled  # type: ignore[method-assign]
    Admission._has_room = has_place  # type: ignore[method-assign]


def install_parts() -> None:
    _parts.is_on = True
    Scheduler.handle = _measured(Scheduler.handle, _part_of)  # type: ignore[method-assign]
    ControlLink._arrived = _received(ControlLink._arrived)  # type: ignore[method-assign]
    look_over(ControlLink, "to_stages", "send")
    look_over(ControlLink, "to_daemon", "send")
    look_over(ClientDesk, "_on_client", "clients")
    look_over(Jobs, "_write", "journal")
    look_over(Sessions, "_deliver_to", "results")
    look_over(Sessions, "finish", "results")
    look_over(StatusView, "refresh", "status")
    shell_module.hand_out = _measured(shell_module.hand_out, lambda *_: "hand out")  # type: ignore[attr-defined]


def look_over(cls: type, name: str, part: str) -> None:
    setattr(cls, name, _measured(getattr(cls, name), lambda *_: part))


def _measured(function: Callable[..., Any], part: Callable[..., str]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        _parts.enter(part(*args))
        try:
            return function(*args, **named)
        finally:
            _parts.leave()

    return call


def _received(arrived: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def each(*args: Any) -> Iterator[Any]:
        messages = arrived(*args)
        while True:
            _parts.enter("receive")
            try:
                message = next(messages, None)
            finally:
                _parts.leave()
            if message is None:
                return
            yield message

    return each


def _part_of(_: Scheduler, event: object, now: float) -> str:
    if isinstance(event, StepReturned):
        return "plan"
    if isinstance(event, Submitted):
        return "new"
    return "stage reports" if isinstance(event, StageComputed) else "other events"


def main() -> int:
    out, most_running = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    by_part = sys.argv[1] == "--parts"
    if by_part:
        del sys.argv[1]
        install_parts()
    install_steps(most_running)

    def body(run_dir: Path, index: int) -> None:
        try:
            coordinator.body(run_dir, index)
        finally:
            names = [*FACTS, *(PARTS if by_part else ())]
            out.write_text(json.dumps({"names": names, "steps": _steps.steps}))

    return process_main("coordinator", body)


if __name__ == "__main__":
    sys.exit(main())
