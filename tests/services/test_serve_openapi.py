"""The description is true: what it lists is what there is, and schemathesis, which sends what the
description allows and what it does not, finds no answer that it does not describe."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipemax.services.batch.openai_bodies import LineError, fields_of
from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL
from pipemax.services.serve.app import ROUTES
from pipemax.services.serve.completions import read_request
from pipemax.services.serve.metrics import endpoint_of
from pipemax.services.serve.openapi import describe
from support.fake_coordinator import FakeCoordinator
from support.http_server import HttpServer

# Some of the forms that it takes for wrong reach the server as right ones: its encoder leaves out
# what was wrong with them. Wrong forms have a test of their own.
CONFIG = """
[[operations]]
include-operation-id = "createFile"
checks.negative_data_rejection.enabled = false
"""


def test_every_route_is_described_and_counted() -> None:
    paths = describe("m", with_keys=False)["paths"]
    described = {(method.upper(), path) for path, item in paths.items() for method in item}
    routes = {(method, path.replace(":path", "")) for method, path, _ in ROUTES}
    assert described == {route for route in routes if route[1] != "/openapi.json"}
    for _, path in routes:
        assert endpoint_of(path) == path


def test_keys_are_described() -> None:
    found = describe(None, with_keys=True)
    assert found["components"]["securitySchemes"]
    for path, item in found["paths"].items():
        for operation in item.values():
            assert ("security" in operation) == path.startswith("/v1/")
            assert ("401" in operation["responses"]) == path.startswith("/v1/")


@pytest.mark.parametrize("url", [CHAT_URL, COMPLETIONS_URL])
def test_what_may_only_ask_for_nothing_says_so(url: str) -> None:
    """For each described field, the server's own reading of what the description allows it."""
    name = "ChatCompletionRequest" if url == CHAT_URL else "CompletionRequest"
    schema = describe("m", with_keys=False)["components"]["schemas"][name]
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
    if url == COMPLETIONS_URL:
        prompt = {"prompt": "a"}
    body = {"model": "m", **prompt}
    assert set(schema["required"]) == set(body)
    for field in schema["properties"]:
        if field not in body:
            read_request(body | {field: None}, url, "m")
    for field, values in fields_of(url)[1].items():
        if field in ("stream", "stream_options"):
            continue
        assert schema["properties"][field] == {"enum": [None, *values]}
        for value in values:
            read_request(body | {field: value}, url, "m")
        with pytest.raises(LineError, match=field):
            read_request(body | {field: "something else"}, url, "m")


def schemathesis(server: HttpServer, folder: Path, *arguments: str) -> None:
    """Fails for whatever it finds."""
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    program = Path(sys.executable).with_name("st")
    options = ("--config-file", config, "run", f"{server.url}/openapi.json", *arguments)
    done = subprocess.run(
        [program, *options], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert "passed" in done.stdout


def test_schemathesis_finds_nothing(tmp_path: Path, runtime_dir: Path) -> None:
    with (
        FakeCoordinator(runtime_dir / "i") as fake,
        HttpServer(endpoint=fake.endpoint, folder=tmp_path / "serve") as server,
    ):
        schemathesis(server, tmp_path, "-n", "3", "--seed", "1", "--phases", "fuzzing")


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_schemathesis_finds_nothing_in_long_runs(
    seed: int, tmp_path: Path, runtime_dir: Path
) -> None:
    with (
        FakeCoordinator(runtime_dir / "i") as fake,
        HttpServer(endpoint=fake.endpoint, folder=tmp_path / "serve") as server,
    ):
        schemathesis(server, tmp_path, "--max-examples", "200", "--seed", str(seed))
