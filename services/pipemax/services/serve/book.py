"""What is kept of batches: one small file each, written whole at every change of status.

A batch's requests and results are in a job of the system's journal, of the batch's id as its name.
Both survive whatever dies; here is what the journal does not know.
"""

import contextlib
import re
import secrets
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from pipemax.services.serve.store import write_whole

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
]
ENDED = ("completed", "failed", "expired", "cancelled")
_BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed. Field names are OpenAI's."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. Field names are OpenAI's; times are Unix times in seconds."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = Counts()
    job_is_gone: bool = False
    """Ours: nothing is left of it in the system's journal."""

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


def new_batch_id() -> str:
    """Cannot be guessed: 128 random bits."""
    return f"batch_{secrets.token_hex(16)}"


def shown(batch: Batch) -> dict[str, Any]:
    """As OpenAI's clients see it."""
    found: dict[str, Any] = msgspec.to_builtins(batch)
    del found["job_is_gone"]
    if not batch.has_ended:
        found["output_file_id"] = found["error_file_id"] = None  # they are being written
    found["object"] = "batch"
    found["errors"] = {"object": "list", "data": found["errors"]} if batch.errors else None
    return found


class Book:
    """All batches. May be used by several threads; `add` and `change` wait for the disk, and the
    others never for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "batches"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._lock = threading.Lock()
        """On what is in memory."""
        self._writing = threading.Lock()
        self._batches: dict[str, Batch] = {}
        for path in self._folder.iterdir():
            if path.suffix == ".json" and _BATCH_ID.fullmatch(path.stem):
                with contextlib.suppress(OSError, msgspec.DecodeError):
                    found = msgspec.json.decode(path.read_bytes(), type=Batch)
                    self._batches[found.id] = found

    def get(self, batch_id: str) -> Batch | None:
        with self._lock:
            return self._batches.get(batch_id)

    def all(self) -> list[Batch]:
        """Newest first."""
        with self._lock:
            found = list(self._batches.values())
        return sorted(found, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def totals(self) -> Counter[str]:
        """By status."""
        return Counter(batch.status for batch in self.all())

    def add(self, batch: Batch) -> None:
        with self._writing:
            self._write(batch)

    def change(self, batch_id: str, *allowed: Status, **fields: Any) -> Batch:
        """Changes a batch, if its status is one of those allowed, or none are named. Returns it as
        it then is."""
        with self._writing:
            with self._lock:
                batch = self._batches[batch_id]
            if allowed and batch.status not in allowed:
                return batch
            changed = replace(batch, **fields)
            self._write(changed)
            return changed

    def count(self, batch_id: str, counts: Counts) -> None:
        """Notes how far it is; lost with this process, and found again."""
        with self._lock:
            batch = self._batches[batch_id]
            self._batches[batch_id] = replace(batch, request_counts=counts)

    def _write(self, batch: Batch) -> None:
        write_whole(self._folder / f"{batch.id}.json", msgspec.json.encode(batch))
        with self._lock:
            self._batches[batch.id] = batch

    def reads(self, file_id: str) -> bool:
        """Whether a batch has yet to read this file."""
        return any(
            batch.input_file_id == file_id and batch.status == "validating" for batch in self.all()
        )
