"""Programs of a benchmark that run as processes of their own and answer line by line, in JSON."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipemax.proto.errors import PipemaxSystemError

_STOP_S = 10.0
_LAST_WORDS_BYTES = 4000


class Child:
    """A program that takes a JSON object in a line of standard input and answers each with one."""

    def __init__(
        self, name: str, argv: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment`: besides this process's own. Raises PipemaxSystemError when the program
        cannot be started."""
        self._name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
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
            self._errors.close()
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
        """To what was told first. Raises PipemaxSystemError with the program's last line when it
        has ended, or says something else than JSON."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            pass
        raise PipemaxSystemError(f"{self._name}: {self._why(line)}")

    def close(self) -> None:
        """Ends it: by the end of its input, or after a while by force. Safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._errors.close()

    def _why(self, line: str) -> str:
        if line:
            return f"{line.strip()[:200]!r} is no answer"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _LAST_WORDS_BYTES))
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        return words[-1] if words else f"ended with status {self._process.returncode}"


@contextlib.contextmanager
def children(*all_of: Child) -> Iterator[tuple[Child, ...]]:
    """Closes them at the end of the block."""
    try:
        yield all_of
    finally:
        for child in all_of:
            child.close()
