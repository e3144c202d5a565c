"""The `pipemax` command as a user runs it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

_COMMAND = [sys.executable, "-m", "pipemax"]


def run_pipemax(*arguments: object, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class Up:
    """`pipemax up` in a shell of its own; ready on entry, stopped on exit if it still runs."""

    def __init__(self, *arguments: object) -> None:
        self._arguments = [*_COMMAND, "up", *map(str, arguments)]

    def __enter__(self) -> "Up":
        self.process = subprocess.Popen(
            self._arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        if not self.ready_line:
            raise AssertionError(f"`up` ended: {self.process.communicate()[1]}")
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        for process in self.family:
            process.wait(10)

    @property
    def family(self) -> list[psutil.Process]:
        """The processes of this system that are alive, by the run directory on their command
        line."""
        root = os.environ["PIPEMAX_RUNTIME_DIR"]
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(word).startswith(root) for word in process.info["cmdline"] or ())
            and process.status() != psutil.STATUS_ZOMBIE
        ]

    def child(self, name: str) -> psutil.Process:
        """`coordinator`, `kv_daemon`, `stage_worker 0`, …"""
        module, _, index = name.partition(" ")
        for process in self.family:
            words = process.cmdline()
            if f"pipemax.{module}" in words and (not index or index in words):
                return process
        raise AssertionError(f"no process {name}")


def eventually(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether `condition` comes true within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
