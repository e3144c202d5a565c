"""The files of one batch, from what was asked for to what is there when it is over."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from pipemax.client import Client
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.services.batch import manifest as manifests
from pipemax.services.batch.inputs import STDIN, Fingerprint, check_input, fingerprint
from pipemax.services.batch.job import run_batch
from pipemax.services.batch.manifest import Manifest, Setting, Start
from pipemax.services.batch.outputs import (
    STDOUT,
    ResultFile,
    check_output,
    pack,
    unpack,
    working_file,
)
from pipemax.services.batch.report import BatchProgress, BatchReport
from pipemax.services.batch.resume import Ledger, drop_errors
from pipemax.services.batch.tally import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFiles:
    """What a user asked for."""

    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    """One for all inputs, or one for each."""
    errors: Path | None = None
    """Where error lines go instead of among the results."""
    resume: bool = False
    """Go on by custom_id whatever the manifest says."""
    overwrite: bool = False
    retry_errors: bool = False

    def check(self) -> None:
        """Raises ConfigError, before anything is loaded, for files that cannot be used."""
        if len(self.outputs) not in (1, len(self.inputs)):
            raise ConfigError(
                f"{len(self.outputs)} output files for {len(self.inputs)} input files; give one "
                "for all or one for each"
            )
        if self.resume and self.overwrite:
            raise ConfigError("--resume goes on and --overwrite starts over; give one of them")
        if self.errors is not None and len(self.outputs) > 1:
            raise ConfigError("--error-file goes with one output file")
        if self.inputs.count(STDIN) > 1:
            raise ConfigError("standard input can be read once; give `-i -` once")
        for path in self.inputs:
            check_input(path)
        written = [*self.outputs, *([self.errors] if self.errors else [])]
        for index, path in enumerate(written):
            for other in (*self.inputs, *written[:index]):
                if _same_file(path, other):
                    raise ConfigError(f"{path} is given twice; give another output")
            check_output(path)


def _same_file(one: Path, other: Path) -> bool:
    if STDOUT in (one, other):
        return one == other and one != STDIN
    if one.exists() and other.exists():
        return one.samefile(other) and one.is_file()
    return one.absolute() == other.absolute()


@dataclass(frozen=True, slots=True)
class _Planned:
    inputs: tuple[Path, ...]
    output: Path
    manifest: Manifest | None
    start: Start
    lines: int | None


class Batch:
    """A batch whose files were looked at, ready to be opened."""

    def __init__(self, files: BatchFiles, settings: Mapping[str, Setting]) -> None:
        """Reads the inputs once. Raises ConfigError when results of another batch would be lost or
        mixed in, PipemaxSystemError when an input cannot be read to its end."""
        self._files = files
        groups: Sequence[tuple[Path, ...]] = [files.inputs]
        if len(files.outputs) > 1:
            groups = [(path,) for path in files.inputs]
        self._planned = [
            self._plan(group, output, settings)
            for group, output in zip(groups, files.outputs, strict=True)
        ]

    def _plan(
        self, group: tuple[Path, ...], output: Path, settings: Mapping[str, Setting]
    ) -> _Planned:
        found: dict[Path, Fingerprint] | None = None
        if STDIN not in group:
            found = {path: fingerprint(path) for path in group}
        manifest = None
        if found is not None and manifests.can_have_one(output):
            manifest = manifests.describe(found, settings)
        start = manifests.how_to_start(
            output,
            manifest,
            resume=self._files.resume,
            overwrite=self._files.overwrite,
            retry_errors=self._files.retry_errors,
        )
        lines = None if found is None else sum(f.lines for f in found.values())
        return _Planned(group, output, manifest, start, lines)

    @property
    def nothing_to_do(self) -> bool:
        """Every line has its result from an earlier run."""
        return all(planned.start == "nothing to do" for planned in self._planned)

    @property
    def continues(self) -> bool:
        return any(planned.start == "continue" for planned in self._planned)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[list[Route], int | None]]:
        """Routes, and the requests left to do, None if they come through a pipe. Leaving the block
        without an exception says that all are done: packed outputs are then made."""
        with contextlib.ExitStack() as stack:
            work = [p for p in self._planned if p.start != "nothing to do"]
            routes = [self._open(stack, planned) for planned in work]
            left = [
                None if planned.lines is None else max(0, planned.lines - route.ledger.finished)
                for planned, route in zip(work, routes, strict=True)
            ]
            yield routes, None if None in left else sum(count or 0 for count in left)
        for planned in work:
            if manifests.can_have_one(working_file(planned.output)):
                pack(working_file(planned.output), planned.output)
            if planned.manifest is not None:
                manifests.save(replace(planned.manifest, complete=True), planned.output)

    def _open(self, stack: contextlib.ExitStack, planned: _Planned) -> Route:
        ledger = Ledger()
        stack.callback(ledger.close)
        working, errors = working_file(planned.output), self._files.errors
        if manifests.can_have_one(planned.output):
            stack.enter_context(locked(planned.output))
            if planned.start == "new":
                _empty(working)
            elif working != planned.output and not working.exists():
                unpack(planned.output, working)
        if errors is not None and planned.start == "new" and errors != STDOUT:
            _empty(errors)
        if planned.start == "continue":
            for path in [working] if errors is None else [working, errors]:
                if self._files.retry_errors:
                    drop_errors(path)
                ledger.load(path)
        if planned.manifest is not None:
            manifests.save(planned.manifest, planned.output)
        results = stack.enter_context(contextlib.closing(ResultFile(working)))
        error_file = results
        if errors is not None:
            error_file = stack.enter_context(contextlib.closing(ResultFile(errors)))
        return Route(planned.inputs, results, error_file, ledger)


def run_files(
    client: Client,
    files: BatchFiles,
    settings: Mapping[str, Setting],
    progress: BatchProgress | None = None,
    request_timeout_s: float | None = None,
) -> BatchReport:
    """Runs what has no result yet through a client; see `Batch` and `run_batch` for what it
    raises."""
    batch = Batch(files, settings)
    with batch.opened() as (routes, num_requests):
        return run_batch(client, routes, progress, num_requests, request_timeout_s)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Raises ConfigError when another run writes to `output`: results would come twice. The lock is
    the kernel's and ends with the process, whatever becomes of the file."""
    path = output.with_name(output.name + ".lock")
    while True:
        try:
            with path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    try:
                        yield
                    finally:
                        path.unlink(missing_ok=True)
                    return
        except BlockingIOError as error:
            raise ConfigError(f"another run writes {output}; wait for it, or stop it") from error


def _empty(path: Path) -> None:
    """Of what an earlier batch left."""
    try:
        if path.is_file() or not path.exists():
            path.write_bytes(b"")
    except OSError as error:
        raise PipemaxSystemError(f"cannot write {path}: {error.strerror}") from error
