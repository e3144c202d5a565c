"""One part, in a process of its own, for as long as it may take and no longer."""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_findings
from gpu_findings import Findings

GRACE_S = 5.0
"""Between asking a part at its limit to end and killing it: its systems stop their processes."""
SETTLE_S = 10.0
"""What a part started may take to notice that the part has ended: a server of processes that has
loaded CUDA's libraries takes seconds to leave."""
_LAST_LINES = 60
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one part."""

    name: str
    status: str
    """`pass`, `fail` or `skip`."""
    reason: str
    """Why it is not `pass`."""
    seconds: float
    findings: Findings
    output: tuple[str, ...] = ()
    """The last lines it printed, unless it passed."""


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Somebody asked the whole check to end."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__("interrupted")
        self.outcome = outcome


def adopt_orphans(adopt: bool = True) -> None:
    """Processes whose parent dies become this one's children, so that none is lost sight of."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def run_part(
    name: str,
    command: Sequence[str],
    *,
    limit_s: float,
    findings_file: Path,
    environment: Mapping[str, str],
    folder: Path,
    echo: Callable[[str], None],
) -> Outcome:
    """Runs `command`, which writes `findings_file`. Nothing it started is alive afterwards; other
    processes below this one are left alone.

    Raises Interrupted, with what was found until then, for a KeyboardInterrupt."""
    findings_file.unlink(missing_ok=True)
    started_s = time.monotonic()
    bystanders = frozenset(process.pid for process in _alive(frozenset()))
    part = subprocess.Popen(
        command,
        cwd=folder,
        env={**environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(part, lines, echo), daemon=True)
    reader.start()
    problem, interrupted = "", False
    try:
        part.wait(limit_s)
    except subprocess.TimeoutExpired:
        problem = f"killed at its limit of {limit_s:.0f} s"
        _ask_to_end(part)
    except KeyboardInterrupt:
        problem, interrupted = "interrupted", True
        _ask_to_end(part)
    if problem:
        part.kill()
    part.wait()  # first of all: whoever else waits for it takes its status
    left = _kill_descendants(bystanders, 0.0 if problem else SETTLE_S)
    reader.join(GRACE_S)
    if part.stdout is not None and not reader.is_alive():
        part.stdout.close()
    seconds = time.monotonic() - started_s
    if not problem and left:
        problem = "left behind " + "; ".join(left)
    found = gpu_findings.read(findings_file)
    outcome = judge(name, found, part.returncode, problem, seconds, lines)
    if interrupted:
        raise Interrupted(outcome)
    return outcome


def judge(
    name: str,
    found: Findings,
    exit_status: int,
    problem: str,
    seconds: float,
    lines: Sequence[str] = (),
) -> Outcome:
    """`problem`: what the runner saw go wrong. Nothing passes that did not come to its end, or
    that has nothing to show."""
    reasons = [problem] if problem else []
    reasons += found.problems()
    if not reasons and exit_status != 0:
        reasons.append(f"ended with status {exit_status}")
    if not reasons and not found.done:
        reasons.append("ended before it was done")
    if reasons:
        return Outcome(
            name, "fail", "; ".join(reasons), seconds, found, tuple(lines[-_LAST_LINES:])
        )
    if not found.figures:
        why = "; ".join(found.skips)
        if why:
            return Outcome(name, "skip", why, seconds, found)
        return Outcome(
            name, "fail", "it found nothing", seconds, found, tuple(lines[-_LAST_LINES:])
        )
    return Outcome(name, "pass", "", seconds, found)


def _read(part: subprocess.Popen[str], lines: list[str], echo: Callable[[str], None]) -> None:
    assert part.stdout is not None
    with contextlib.suppress(ValueError):  # closed below us
        for line in part.stdout:
            lines.append(line.rstrip("\n"))
            del lines[:-_LAST_LINES]
            echo(lines[-1])


def _ask_to_end(part: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(part.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        part.wait(GRACE_S)


def _kill_descendants(bystanders: frozenset[int], settle_s: float) -> list[str]:
    """Kills everything below this process, but for `bystanders`, that is alive after `settle_s`,
    waits until it is gone, and says in words what it was."""
    import psutil

    settled_s = time.monotonic() + settle_s
    while _alive(bystanders) and time.monotonic() < settled_s:
        time.sleep(0.05)
    found = [f"process {process.pid}, {_name(process)}" for process in _alive(bystanders)]
    deadline_s = time.monotonic() + GRACE_S
    while (alive := _alive(bystanders)) and time.monotonic() < deadline_s:
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=0.2)
    return found


def _alive(bystanders: frozenset[int]) -> list[Any]:
    import psutil

    processes = psutil.Process().children(recursive=True)
    return [p for p in processes if p.pid not in bystanders and _is_running(psutil, p)]


def _is_running(psutil: Any, process: Any) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _name(process: Any) -> str:
    with contextlib.suppress(Exception):
        return f"{process.name()}: {' '.join(process.cmdline())[:120]}"
    return "gone"
