"""Files and batches over HTTP, with OpenAI's own client, on a coordinator's own journal: every line
has its line in one of the two outputs, once, whatever is stopped meanwhile."""

import errno
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from pipemax.client import Jobs, Submit
from pipemax.coordinator.journal_file import state_root
from pipemax.proto.errors import ConfigError
from pipemax.services.serve import book, store, worker
from pipemax.services.serve.book import Book
from pipemax.services.serve.settings import ServeSettings
from pipemax.services.serve.store import FileStore
from support.batch_lines import answer, request
from support.http_server import HttpServer
from support.job_coordinator import JobCoordinator

from .test_serve_completions import error_of, raw

ENDPOINT: Any = "/v1/completions"


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LOOK_AGAIN_S", 0.02)
    monkeypatch.setattr(worker, "_TRY_AGAIN_S", 0.05)


@pytest.fixture
def system() -> Iterator[JobCoordinator]:
    with JobCoordinator() as coordinator:
        yield coordinator


@pytest.fixture
def server(system: JobCoordinator) -> Iterator[HttpServer]:
    with HttpServer() as server:
        yield server


@pytest.fixture
def client(server: HttpServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def client_of(server: HttpServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


def jsonl(*lines: Any) -> bytes:
    texts = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return b"".join(text + b"\n" for text in texts)


def start(client: openai.OpenAI, *lines: Any, window: Any = "24h", **fields: Any) -> Any:
    file = client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window=window, **fields
    )


def wait_for(client: openai.OpenAI, batch: Any, until: Callable[[Any], bool] | None = None) -> Any:
    deadline = time.monotonic() + 60
    while True:
        found = client.batches.retrieve(batch.id)
        if until is None:
            if found.status in ("completed", "failed", "expired", "cancelled"):
                return found
        elif until(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def counts(batch: Any) -> tuple[int, int, int]:
    found = batch.request_counts
    return found.total, found.completed, found.failed


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_from_a_file_to_results(client: openai.OpenAI) -> None:
    lines = [request(f"id-{n}", "w" * (n + 1)) for n in range(10)]
    lines += [request("refused", "refuse"), request("negative", max_tokens=-5)]
    batch = start(client, *lines, metadata={"for": "me"})
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", ENDPOINT, "24h")
    assert batch.expires_at == batch.created_at + 86400
    batch = wait_for(client, batch)
    assert (batch.status, counts(batch), batch.errors) == ("completed", (12, 10, 2), None)
    assert batch.metadata == {"for": "me"}
    assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    results = {line["custom_id"]: line for line in lines_of(client, batch.output_file_id)}
    assert set(results) == {f"id-{n}" for n in range(10)}
    body = results["id-2"]["response"]["body"]
    assert (body["choices"][0]["text"], body["model"]) == ("WWW", "fake")
    errors = {line["custom_id"]: line["error"] for line in lines_of(client, batch.error_file_id)}
    assert {name: error["code"] for name, error in errors.items()} == {
        "refused": "too_long",
        "negative": "invalid_field",
    }
    output = client.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert output.bytes == len(client.files.content(output.id).content)
    deadline = time.monotonic() + 30
    with Jobs() as jobs:
        while jobs.all():  # what it held is in files now
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert modes(state_root() / "serve") == {0o600}


def test_lists_go_by_pages(client: openai.OpenAI) -> None:
    ids = [start(client, request(f"id-{n}")).id for n in range(3)]
    listed = list(client.batches.list(limit=2))  # the client turns the pages
    assert sorted(batch.id for batch in listed) == sorted(ids)
    assert client.batches.list(limit=1).has_more
    for batch in listed:
        wait_for(client, batch)
    inputs = [file.id for file in client.files.list(purpose="batch", limit=1)]
    assert sorted(inputs) == sorted(batch.input_file_id for batch in listed)
    ascending = [file.id for file in client.files.list(purpose="batch", order="asc")]
    assert ascending == inputs[::-1]
    outputs = [file.id for file in client.files.list(purpose="batch_output")]
    assert len(outputs) == 3
    for query in ("limit=0", "limit=x", "limit=1&limit=2", "order=up", "purpose=vision", "what=1"):
        with pytest.raises(openai.BadRequestError):
            client.get(f"/files?{query}", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-none")


def test_lines_that_are_none_fail_the_batch(client: openai.OpenAI) -> None:
    other = {**request("chat"), "url": "/v1/chat/completions"}
    batch = wait_for(
        client, start(client, request("a"), b"not JSON", other, request("a"), {"custom_id": "b"})
    )
    assert batch.status == "failed"
    assert batch.failed_at is not None
    found = [(error.line, error.code) for error in batch.errors.data]
    assert found == [
        (2, "invalid_json"),
        (3, "mismatched_url"),
        (4, "duplicate_custom_id"),
        (5, "invalid_line"),
    ]
    assert wait_for(client, start(client)).errors.data[0].code == "empty_file"
    with Jobs() as jobs:
        assert jobs.all() == ()


def test_cancelling(client: openai.OpenAI, system: JobCoordinator) -> None:
    system.paused = True
    batch = start(client, request("a"), request("b"))
    wait_for(client, batch, lambda found: found.status == "in_progress")
    assert client.batches.cancel(batch.id).status == "cancelling"
    found = wait_for(client, batch)
    assert (found.status, counts(found)) == ("cancelled", (2, 0, 0))
    assert found.cancelling_at is not None
    assert found.cancelled_at is not None
    assert found.output_file_id is None
    assert client.batches.cancel(batch.id).status == "cancelled"
    system.paused = False
    done = wait_for(client, start(client, request("a")))
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.cancel(done.id)


def test_a_window_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.__dict__, "time", FastTime)
    asked = itertools.count()

    def answer_some(submit: Submit) -> Any:
        system.paused = next(asked) > 70  # behind the first 64, which run together
        return answer(submit)

    lines = [request(f"id-{n}") for n in range(100)]
    with (
        JobCoordinator(answer=answer_some) as system,
        HttpServer() as server,
        client_of(server) as client,
    ):
        batch = start(client, *lines, window="1m")
        wait_for(client, batch, lambda found: found.request_counts.completed == 64)
        FastTime.ahead_s = 100.0
        try:
            found = wait_for(client, batch)
        finally:
            FastTime.ahead_s = 0.0
        assert (found.status, counts(found)) == ("expired", (100, 64, 36))
        done = [line["custom_id"] for line in lines_of(client, found.output_file_id)]
        errors = lines_of(client, found.error_file_id)
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    everything = [*done, *(line["custom_id"] for line in errors)]
    assert sorted(everything) == sorted(line["custom_id"] for line in lines)


class FastTime:
    """The module `time`, for the worker."""

    ahead_s = 0.0
    monotonic = staticmethod(time.monotonic)

    @classmethod
    def time(cls) -> float:
        return time.time() + cls.ahead_s


def test_a_batch_outlives_the_server_and_the_system(runtime_dir: Path) -> None:
    lines = [request(f"id-{n}", "w") for n in range(700)]
    with JobCoordinator() as system:
        system.paused = True
        with HttpServer() as server, client_of(server) as client:
            batch = start(client, *lines)
            wait_for(client, batch, lambda found: found.request_counts.total > 0)
            # The server ends while it hands the lines over, or behind that.
    with JobCoordinator() as system:
        system.paused = True
        with HttpServer() as server, client_of(server) as client:
            wait_for(client, batch, lambda found: found.status == "in_progress")
    with HttpServer(wait_for_system=False) as server, client_of(server) as client:
        assert client.batches.retrieve(batch.id).status == "in_progress"  # nobody runs it now
        with JobCoordinator():
            found = wait_for(client, batch)
        # Once it is done, neither is needed.
        assert (found.status, counts(found)) == ("completed", (700, 700, 0))
        results = [line["custom_id"] for line in lines_of(client, found.output_file_id)]
    assert sorted(results) == sorted(f"id-{n}" for n in range(700))


@pytest.mark.parametrize("position", range(6))
def test_a_full_disk_delays(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    """Wherever it is noticed: what was begun is begun again, and nothing is there twice."""
    batch = start(client, *(request(f"id-{n}", "w" * (n + 1)) for n in range(5)))
    numbers = itertools.count()
    write = store.write_whole

    def failing(path: Path, content: bytes) -> None:
        if next(numbers) == position:
            raise OSError(errno.ENOSPC, "no space left")
        write(path, content)

    monkeypatch.setattr(store, "write_whole", failing)
    monkeypatch.setattr(book, "write_whole", failing)
    found = wait_for(client, batch)
    assert (found.status, counts(found)) == ("completed", (5, 5, 0))
    results = lines_of(client, found.output_file_id)
    assert sorted(line["custom_id"] for line in results) == [f"id-{n}" for n in range(5)]
    assert len(client.files.list().data) == 2


def test_a_disk_that_is_full_at_once(
    client: openai.OpenAI, server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = client.files.create(file=("a", b"x"), purpose="batch")

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(store, "write_whole", full)
    monkeypatch.setattr(book, "write_whole", full)
    body = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h"}
    form_type = {"Content_Type": "multipart/form-data; boundary=b"}
    for found in (
        raw(server, "POST", "/v1/batches", body),
        raw(server, "POST", "/v1/files", form(PURPOSE, FILE), **form_type),
    ):
        assert (found[0], error_of(found)["code"]) == (507, "disk_full")
    assert client.batches.list().data == []
    assert [found.id for found in client.files.list()] == [file.id]
    left = sorted(path.name for path in (state_root() / "serve" / "files").iterdir())
    assert left == [f"{file.id}.data", f"{file.id}.json"]


def test_what_a_batch_must_say(client: openai.OpenAI, server: HttpServer) -> None:
    file = client.files.create(file=("a", jsonl(request("a"))), purpose="batch")
    good = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h"}
    for changes, param in (
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after"),
    ):
        found = raw(server, "POST", "/v1/batches", good | changes)
        assert (found[0], error_of(found)["param"]) == (400, param), changes
    found = raw(server, "POST", "/v1/batches", good | {"input_file_id": "file-none"})
    assert (found[0], error_of(found)["code"]) == (404, "file_not_found")
    for path in ("/v1/batches/batch_none", "/v1/files/file-none", "/v1/files/..%2Flock/content"):
        assert raw(server, "GET", path)[0] == 404
    done = wait_for(client, start(client, request("a")))
    found = raw(server, "POST", "/v1/batches", good | {"input_file_id": done.output_file_id})
    assert (found[0], error_of(found)["code"]) == (400, "purpose")


def test_deleting(client: openai.OpenAI) -> None:
    batch = wait_for(client, start(client, request("a")))
    for file_id in (batch.input_file_id, batch.output_file_id):
        assert client.files.delete(file_id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.content(file_id)
    assert not list((state_root() / "serve" / "files").iterdir())


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    body = b"".join(
        b"--b\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n"
        for head, content in parts
    )
    return body + end


PURPOSE = ('name="purpose"', b"batch")
FILE = ('name="file"; filename="../../x/in.jsonl"', b"a\r\nb")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (form(PURPOSE), 400, "missing_field"),
        (form(FILE), 400, "purpose"),
        (form(FILE, ('name="purpose"', b"vision")), 400, "purpose"),
        (form(PURPOSE, FILE, ('name="expires_after[anchor]"', b"x")), 400, "unknown_field"),
        (form(FILE, FILE, PURPOSE), 400, "invalid_form"),
        (form(PURPOSE, ('name="file"', b"x")), 400, "invalid_form"),
        (form(('name="purpose"', b"b" * 5000), FILE), 400, "invalid_form"),
        (form(PURPOSE, FILE, end=b"--b"), 400, "invalid_form"),
        (b"what is this", 400, "invalid_form"),
        (b"", 400, "invalid_form"),
        (form(PURPOSE, ('name="file"; filename="f"', b"x" * 5000)), 413, "too_large"),
        (form(PURPOSE, ('name="file"; filename="f"', b"x" * 200_000)), 413, "too_large"),
    ],
)
def test_forms_that_are_none_leave_nothing(
    runtime_dir: Path, body: bytes, status: int, code: str
) -> None:
    with HttpServer(settings=ServeSettings(max_file_bytes=4096), wait_for_system=False) as server:
        kind = {"Content_Type": "multipart/form-data; boundary=b"}
        found = raw(server, "POST", "/v1/files", body, **kind)
        assert (found[0], error_of(found)["code"]) == (status, code)
        assert not list((state_root() / "serve" / "files").iterdir())


def test_a_form_in_either_order(runtime_dir: Path) -> None:
    with HttpServer(wait_for_system=False) as server:
        kind = {"Content_Type": "multipart/form-data; boundary=b"}
        for body in (form(PURPOSE, FILE), form(FILE, PURPOSE)):
            found = raw(server, "POST", "/v1/files", body, **kind)
            assert found[0] == 200
            file = json.loads(found[2])
            assert (file["filename"], file["bytes"]) == ("in.jsonl", 4)
            content = raw(server, "GET", f"/v1/files/{file['id']}/content")
            assert content[2] == b"a\r\nb"
            assert content[1]["x-content-type-options"] == "nosniff"
        assert raw(server, "POST", "/v1/files", b"{}")[0] == 415


def test_what_is_left_of_a_crash_is_swept(runtime_dir: Path) -> None:
    folder = state_root() / "serve"
    store = FileStore(folder)
    with store.writing("file-" + "0" * 32) as draft:
        draft.write(b"kept")
        kept = draft.keep("k", "batch")
    for name in ("file-x.part", "file-y.data", "file-y.json.new"):
        (folder / "files" / name).write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"another `pipemax serve`"):
        FileStore(folder)
    store.close()
    store = FileStore(folder)
    try:
        assert store.all() == [kept]
        assert sorted(path.suffix for path in (folder / "files").iterdir()) == [".data", ".json"]
        assert Book(folder).all() == []
    finally:
        store.close()
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 700"):
        FileStore(folder)
