"""The client against a coordinator that answers as told: order, credits, loss and recovery."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import Client, Completion, SamplingParams, Submit, connection
from pipemax.proto.errors import ConfigError, NotRunningError, RequestError, WireError
from pipemax.proto.messages.ingest import Refused
from pipemax.proto.rundir import RunLock, create_run_dir, socket_endpoint
from support.fake_coordinator import FakeCoordinator, finished


@pytest.fixture(autouse=True)
def _short_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEARTBEAT_S", 0.1)


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    return runtime_dir / "ingest.sock"


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def test_completions_come_in_the_order_of_the_prompts(path: Path) -> None:
    with FakeCoordinator(path, batch=3) as fake, Client(endpoint=fake.endpoint) as client:
        completions = client.generate(["a", "bb", "ccc"])
        assert texts(completions) == ["A", "BB", "CCC"]
        assert [completion.index for completion in completions] == [0, 1, 2]
        assert [len(completion.token_ids) for completion in completions] == [1, 2, 3]
        assert completions[0].finish_reason == "length"
        assert client.model_name == "fake"
        assert client.max_model_len == 512


def test_stream_gives_completions_as_they_finish(path: Path) -> None:
    with FakeCoordinator(path, batch=3) as fake, Client(endpoint=fake.endpoint) as client:
        assert [c.index for c in client.stream(["a", "b", "c"])] == [2, 1, 0]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([5, 6], [(None, (5, 6))]),
        ([[5, 6], (7,)], [(None, (5, 6)), (None, (7,))]),
        (["a", [7, 8]], [("a", None), (None, (7, 8))]),
        ([], []),
    ],
)
def test_kinds_of_prompts(path: Path, prompts: Any, expected: list[Any]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=7)
    with FakeCoordinator(path) as fake, Client(endpoint=fake.endpoint) as client:
        assert len(client.generate(prompts, params)) == len(expected)
        assert [(s.prompt, s.prompt_token_ids) for s in fake.submitted] == expected
        assert all(submit.sampling == params for submit in fake.submitted)


@pytest.mark.parametrize("prompts", [[1.5], [["a"]], [None], [True, False], 7])
def test_what_is_no_prompt_is_a_type_error(path: Path, prompts: Any) -> None:
    with FakeCoordinator(path) as fake, Client(endpoint=fake.endpoint) as client:
        with pytest.raises(TypeError):
            client.generate(prompts)
        assert fake.submitted == []


def test_chats(path: Path) -> None:
    one = [{"role": "user", "content": "a"}]
    mixed: Any = [one[0], one]
    with FakeCoordinator(path) as fake, Client(endpoint=fake.endpoint) as client:
        assert len(client.chat(one)) == 1
        assert len(client.chat([one, one])) == 2
        assert [submit.messages for submit in fake.submitted] == [tuple(one)] * 3
        with pytest.raises(TypeError, match="mixed"):
            client.chat(mixed)


def test_one_sampling_params_per_prompt(path: Path) -> None:
    params = [SamplingParams(max_tokens=n) for n in (1, 2)]
    with FakeCoordinator(path) as fake, Client(endpoint=fake.endpoint) as client:
        client.generate(["a", "b"], params)
        assert [submit.sampling for submit in fake.submitted] == params
        with pytest.raises(ValueError, match="2 sampling_params for 3 prompts"):
            client.generate(["a", "b", "c"], params)


@pytest.mark.parametrize("credits", [1, 4])
def test_credits_are_never_exceeded(path: Path, credits: int) -> None:
    with (
        FakeCoordinator(path, credits=credits, batch=credits) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        prompts = [str(number) for number in range(20)]
        assert texts(client.generate(prompts)) == prompts
        assert fake.most_unfinished == credits


def test_refusals_and_failures_are_completions(path: Path) -> None:
    def answer(submit: Submit) -> Any:
        if submit.prompt == "bad":
            return Refused(request_id=submit.request_id, code="too_long", message="too long")
        if submit.prompt == "worse":
            return finished(submit, finish_reason="error", error="lost")
        return finished(submit)

    with FakeCoordinator(path, answer) as fake, Client(endpoint=fake.endpoint) as client:
        good, bad, worse, last = client.generate(["good", "bad", "worse", "last"])
    assert (good.text, last.text) == ("GOOD", "LAST")
    assert (bad.finish_reason, bad.error_code, bad.error) == ("error", "too_long", "too long")
    assert (worse.finish_reason, worse.error_code, worse.error) == ("error", "failed", "lost")


def test_what_cannot_be_read_is_not_sent(path: Path) -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=-1.0),
        SamplingParams(top_p="high"),  # type: ignore[arg-type]
        SamplingParams(),
    ]
    with FakeCoordinator(path) as fake, Client(endpoint=fake.endpoint) as client:
        prompts = ["a", "b", "c", "d" * (17 * 2**20)]
        completions = client.generate(prompts, params)
        codes = [completion.error_code for completion in completions]
        assert codes == [None, "invalid_field", "invalid_field", "too_large"]
        assert "temperature" in str(completions[1].error)
        assert len(fake.submitted) == 1


def test_submit_and_poll(path: Path) -> None:
    with (
        FakeCoordinator(path, credits=2, batch=2) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        client.submit(Submit(request_id="a", prompt="x"))
        assert client.poll(0.05) is None
        with pytest.raises(RequestError, match="not finished") as caught:
            client.submit(Submit(request_id="a", prompt="x"))
        assert caught.value.code == "duplicate"
        client.submit(Submit(request_id="b", prompt="y"))
        assert client.free_credits == 0
        with pytest.raises(RequestError) as caught:
            client.submit(Submit(request_id="c", prompt="z"))
        assert caught.value.code == "credits"
        first, second = client.poll(), client.poll()
        assert first is not None
        assert second is not None
        assert (first.request_id, second.request_id) == ("b", "a")
        assert client.poll() is None, "nothing is to come"
        assert client.free_credits == 2


def test_cancel(path: Path) -> None:
    with FakeCoordinator(path, lambda _: None) as fake, Client(endpoint=fake.endpoint) as client:
        client.submit(Submit(request_id="a", prompt="x"))
        client.cancel("a")
        client.cancel("unknown")
        completion = client.poll()
        assert completion is not None
        assert completion.finish_reason == "abort"
        assert fake.cancelled == ["a"]


def test_leaving_a_stream_cancels_the_rest(path: Path) -> None:
    def answer(submit: Submit) -> Any:
        return None if submit.prompt == "slow" else finished(submit)

    with (
        FakeCoordinator(path, answer, credits=3) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        stream = client.stream(["slow", "quick", "slow"])
        assert next(stream).index == 1
        stream.close()  # type: ignore[attr-defined]
        assert client.free_credits == 1, "cancelled requests hold credits until they end"
        assert texts(client.generate(["a", "b", "c", "d"])) == ["A", "B", "C", "D"]
        assert client.free_credits == 3
        assert len(fake.cancelled) == 2


def test_streams_side_by_side(path: Path) -> None:
    with FakeCoordinator(path, credits=3) as fake, Client(endpoint=fake.endpoint) as client:
        first, second = client.stream(["a", "b"]), client.stream(["c", "d"])
        seen = [next(first).text, next(second).text, next(first).text, next(second).text]
        assert sorted(seen) == ["A", "B", "C", "D"]
        assert list(first) == list(second) == []


def test_ids_are_the_same_in_every_run(path: Path) -> None:
    """The coordinator seeds requests without a seed from their ids."""
    ids = []
    for _ in range(2):
        with FakeCoordinator(path) as fake, Client(endpoint=fake.endpoint) as client:
            client.generate(["a", "b"])
            client.generate("a")
            ids.append([submit.request_id for submit in fake.submitted])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 3


def test_status(path: Path) -> None:
    with FakeCoordinator(path) as fake, Client(endpoint=fake.endpoint) as client:
        assert client.status().phase == "ready"


def test_a_new_coordinator_gets_the_unfinished_requests_again(path: Path) -> None:
    first = FakeCoordinator(path, lambda s: finished(s) if s.prompt == "a" else None)
    second = FakeCoordinator(path, instance_id="second")
    with first:
        client = Client(endpoint=first.endpoint)
        stream = client.stream(["a", "b", "c"])
        assert next(stream).text == "A"
    with second, client:
        assert sorted(completion.text for completion in stream) == ["B", "C"]
        assert [submit.prompt for submit in second.submitted] == ["b", "c"]


def test_a_request_no_coordinator_survives_is_given_up(path: Path) -> None:
    client: Client | None = None
    for life in range(4):
        with FakeCoordinator(path, lambda _: None, instance_id=f"life-{life}") as fake:
            if client is None:
                client = Client(endpoint=fake.endpoint)
                client.submit(Submit(request_id="deadly", prompt="x"))
            while len(fake.submitted) < 1:
                assert client.poll(0.1) is None
    assert client is not None
    with FakeCoordinator(path, instance_id="last") as fake, client:
        completion = client.poll()
        assert completion is not None
        assert "unfinished at 4 starts" in str(completion.error)
        assert fake.submitted == []


def test_a_system_that_says_nothing_is_not_running(path: Path) -> None:
    with (
        FakeCoordinator(path, silent=True) as fake,
        pytest.raises(NotRunningError, match=r"did not answer within 0\.3 s"),
    ):
        Client(endpoint=fake.endpoint, timeout_s=0.3)


def test_nobody_there_at_all(path: Path) -> None:
    with pytest.raises(NotRunningError):
        Client(endpoint=f"ipc://{path}", timeout_s=0.3)
    with pytest.raises(NotRunningError, match="pipemax up --name nothing"):
        Client("nothing")


def test_a_system_that_falls_silent_is_an_error(path: Path) -> None:
    with (
        FakeCoordinator(path, lambda _: None) as fake,
        Client(endpoint=fake.endpoint, timeout_s=0.5) as client,
    ):
        client.submit(Submit(request_id="a", prompt="x"))
        fake.silent = True
        with pytest.raises(NotRunningError, match="has not answered"):
            client.poll()


def test_a_system_that_ends_while_we_wait_is_an_error() -> None:
    run_dir = create_run_dir("short")
    lock = RunLock(run_dir)
    with FakeCoordinator(run_dir / "ingest.sock", lambda _: None) as fake:
        assert fake.endpoint == socket_endpoint(run_dir, "ingest")
        with Client("short") as client:
            timer = threading.Timer(0.2, lock.release)
            timer.start()
            with pytest.raises(NotRunningError, match="'short' has ended"):
                client.generate(["a"])
            timer.join()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: FakeCoordinator(path, protocol=99),
        lambda path: FakeCoordinator(path, refuse_hello="protocol"),
    ],
)
def test_another_protocol_is_an_error(path: Path, make: Callable[[Path], FakeCoordinator]) -> None:
    with make(path) as fake, pytest.raises(WireError, match="protocol") as caught:
        Client(endpoint=fake.endpoint)
    assert caught.value.code == "protocol"


@pytest.mark.parametrize(
    ("endpoint", "keys", "text"),
    [
        ("tcp://127.0.0.1:5555", None, "plain TCP is refused"),
        ("tcp://127.0.0.1", "k", "write tcp://HOST:PORT"),
        ("udp://127.0.0.1:5555", None, "write tcp://HOST:PORT"),
        ("ipc:///tmp/x.sock", "k", "go with an endpoint tcp://"),
        (None, "k", "go with an endpoint tcp://"),
        ("tcp://127.0.0.1:5555", "/no/such/folder", "no key folder /no/such/folder"),
    ],
)
def test_tcp_goes_by_keys_and_keys_by_tcp(
    endpoint: str | None, keys: str | None, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        Client(endpoint=endpoint, keys=keys)


def test_a_closed_client_says_so(path: Path) -> None:
    with FakeCoordinator(path) as fake:
        client = Client(endpoint=fake.endpoint)
        client.close()
        client.close()
        with pytest.raises(ConfigError, match="closed"):
            client.generate("a")


def test_the_client_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, pipemax.client; print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
