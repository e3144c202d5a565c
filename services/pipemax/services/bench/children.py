"""Programs of a benchmark that run as processes of their own and answer line by line, in JSON."""

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipemax.proto.errors import PipemaxSystemError

_STOP_S = 10.0
_LAST_WORDS_BYTES = 40_000
_CAUSES = 3
_RAISED = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit)\b(?:: .*|$)")
"""What Python says of an exception, with whatever a logger puts before it."""


class Child:
    """A program that takes a JSON object in a line of standard input and answers each with one."""

    def __init__(
        self, name: str, argv: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment`: besides this process's own. Raises PipemaxSystemError when the program
        cannot be started."""
        self._name = name
        handle, path = tempfile.mkstemp(prefix=f"pipemax-bench-{_file_name(name)}-", suffix=".log")
        self._errors, self._log, self._keep_log = os.fdopen(handle, "w+b"), Path(path), False
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # `close` ends what it has started, too
            )
        except OSError as error:
            self._close_log()
            raise PipemaxSystemError(f"{name}: {argv[0]}: {error.strerror}") from error

    def ask(self, question: Mapping[str, Any]) -> Any:
        self.tell(question)
        return self.answer()

    def tell(self, question: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def answer(self) -> Any:
        """To what was told first. Raises PipemaxSystemError with what the program said last when
        it has ended, or says something else than JSON; its log is kept then."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            pass
        raise PipemaxSystemError(f"{self._name}: {self._why(line)}")

    @property
    def session(self) -> int:
        """Of it and of what it has started; see `processes.cpu_seconds`."""
        return self._process.pid

    def pause(self) -> None:
        """Stops it and what it has started until `resume`: not even what spins takes a core."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends it and what it has started: by the end of its input, or after a while by force.
        Safe to call twice."""
        self.resume()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._close_log()

    def _signal(self, signum: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signum)

    def _close_log(self) -> None:
        self._errors.close()
        if not self._keep_log:
            self._log.unlink(missing_ok=True)

    def _why(self, line: str) -> str:
        if line:
            return f"{line.strip()[:200]!r} is no answer"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _LAST_WORDS_BYTES))
        words = last_words(self._errors.read().decode(errors="replace"))
        self._keep_log = True
        why = words or f"ended with status {self._process.returncode}"
        return f"{why} (its log: {self._log})"


def last_words(log: str) -> str:
    """The last exceptions in a log, in order, each once; without any, its last line. A program of
    several processes often ends with one that only says that another has failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    raised = [found.group() for line in lines if (found := _RAISED.search(line))]
    causes = list(dict.fromkeys(reversed(raised)))[:_CAUSES]
    return "; ".join(reversed(causes)) or (lines[-1] if lines else "")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


@contextlib.contextmanager
def children(*all_of: Child) -> Iterator[tuple[Child, ...]]:
    """Closes them at the end of the block."""
    try:
        yield all_of
    finally:
        for child in all_of:
            child.close()
