"""A coordinator that notes down what every step costs it and which part of it does, for benchmarks:
it runs the shipped process and looks over its shoulder.

    python measuring_coordinator.py OUT --run-dir DIR [--parent-pipe-fd N]

A step's cost is all that the process's one loop does from the moment at which one step's tokens
were dealt with to that at which the next one's were, waiting for messages left out: CPU time, which
work of others on the machine adds little to. When the process ends, OUT holds a JSON object:
`parts`, their names, and `steps`, of [monotonic seconds, requests of the step, running, waiting,
wall seconds from the arrival of its tokens to when the next plan had left, resident bytes, CPU
seconds by part].
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipemax.coordinator import main as coordinator
from pipemax.coordinator import shell as shell_module
from pipemax.coordinator.client_desk import ClientDesk
from pipemax.coordinator.control_link import ControlLink
from pipemax.coordinator.core import Scheduler
from pipemax.coordinator.events import StepReturned, Submitted
from pipemax.coordinator.jobs import Jobs
from pipemax.coordinator.sessions import Sessions
from pipemax.coordinator.shell import CoordinatorShell
from pipemax.coordinator.status import StatusView
from pipemax.proto.process import process_main

PARTS = (
    "receive", "plan", "stage reports", "other events", "send", "hand out", "clients", "new",
    "journal", "results", "status", "loop",
)  # fmt: skip
_PAGE_BYTES = 4096


class Meter:
    """CPU time by part: what a part calls that is a part of its own does not count for it."""

    def __init__(self) -> None:
        self.spent_s = dict.fromkeys(PARTS, 0.0)
        self.steps: list[list[float]] = []
        self._inside = ["loop"]
        self._since_s = time.thread_time()

    def enter(self, part: str) -> None:
        self._switch()
        self._inside.append(part)

    def leave(self) -> None:
        self._switch()
        self._inside.pop()

    def step(self, *facts: float) -> None:
        self._switch()
        self.steps.append([time.monotonic(), *facts, *self.spent_s.values()])
        self.spent_s = dict.fromkeys(PARTS, 0.0)

    def _switch(self) -> None:
        now_s = time.thread_time()
        self.spent_s[self._inside[-1]] += now_s - self._since_s
        self._since_s = now_s


_meter = Meter()


def _measured(function: Callable[..., Any], part: Callable[..., str]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        _meter.enter(part(*args))
        try:
            return function(*args, **named)
        finally:
            _meter.leave()

    return call


def _received(receive: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def each(link: ControlLink) -> Iterator[Any]:
        messages = receive(link)
        while True:
            _meter.enter("receive")
            try:
                message = next(messages, None)
            finally:
                _meter.leave()
            if message is None:
                return
            yield message

    return each


def _part_of(_: Scheduler, event: object, now: float) -> str:
    if isinstance(event, StepReturned):
        return "plan"
    if isinstance(event, Submitted):
        return "new"
    return "stage reports" if type(event).__name__ == "StageComputed" else "other events"


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def look_over(cls: type, name: str, part: str) -> None:
    setattr(cls, name, _measured(getattr(cls, name), lambda *_: part))


def install() -> None:
    Scheduler.handle = _measured(Scheduler.handle, _part_of)  # type: ignore[method-assign]
    ControlLink.receive = _received(ControlLink.receive)  # type: ignore[method-assign]
    look_over(ControlLink, "to_stages", "send")
    look_over(ControlLink, "to_daemon", "send")
    look_over(ClientDesk, "_on_client", "clients")
    look_over(Jobs, "_write", "journal")
    look_over(Sessions, "_deliver_to", "results")
    look_over(Sessions, "finish", "results")
    look_over(StatusView, "refresh", "status")
    shell_module.hand_out = _measured(shell_module.hand_out, lambda *_: "hand out")  # type: ignore[attr-defined]
    returned, told = CoordinatorShell._step_returned, ControlLink.to_stages
    left_s = 0.0

    def to_stages(link: ControlLink, message: Any) -> None:
        nonlocal left_s
        told(link, message)
        left_s = time.monotonic()

    def step_returned(shell: CoordinatorShell, step: int, whole: Any) -> None:
        arrived_s = time.monotonic()
        returned(shell, step, whole)
        if whole is not None:
            state = shell._scheduler.state
            facts = (len(whole.tokens), len(state.running), len(state.waiting))
            _meter.step(*facts, max(0.0, left_s - arrived_s), _resident_bytes())

    ControlLink.to_stages = to_stages  # type: ignore[method-assign]
    CoordinatorShell._step_returned = step_returned  # type: ignore[method-assign]


def main() -> int:
    out = Path(sys.argv.pop(1))
    install()

    def body(run_dir: Path, index: int) -> None:
        try:
            coordinator.body(run_dir, index)
        finally:
            out.write_text(json.dumps({"parts": PARTS, "steps": _meter.steps}))

    return process_main("coordinator", body)


if __name__ == "__main__":
    sys.exit(main())
