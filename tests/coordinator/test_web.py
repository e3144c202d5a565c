"""What the coordinator serves: resources, apart from the server."""

import re
from http import HTTPStatus

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Gauge

from pipemax.coordinator.http_server import Reply, Request
from pipemax.coordinator.live_spans import LiveSpans
from pipemax.coordinator.web import resources
from pipemax.proto.messages.ingest import Status
from pipemax.proto.messages.spans import StageSpans
from pipemax.proto.states import STATES
from pipemax.services.simulator.gantt import COLOURS
from support.messages import EXAMPLES

STATUS = next(message for message in EXAMPLES if isinstance(message, Status))
SPANS = next(message for message in EXAMPLES if isinstance(message, StageSpans))


class World:
    def __init__(self, status: Status | None = STATUS) -> None:
        registry = CollectorRegistry()
        Gauge("pipemax_example", "An example.", registry=registry).set(3)
        self.spans = LiveSpans()
        self.resources = resources(registry, lambda: status, self.spans)

    def get(self, path: str, accept: str = "", **query: str) -> Reply:
        return self.resources[path](Request(path, query, {"accept": accept}))


def test_metrics_come_in_the_format_that_is_asked_for() -> None:
    plain = World().get("/metrics")
    assert b"pipemax_example 3.0" in plain.body
    assert plain.content_type.startswith("text/plain")
    newer = World().get("/metrics", accept="application/openmetrics-text")
    assert newer.body.endswith(b"# EOF\n")
    assert newer.content_type.startswith("application/openmetrics-text")


@pytest.mark.parametrize(
    ("phase", "code"),
    [
        ("ready", HTTPStatus.OK),
        ("draining", HTTPStatus.OK),
        ("starting", HTTPStatus.SERVICE_UNAVAILABLE),
        ("recovering", HTTPStatus.SERVICE_UNAVAILABLE),
        (None, HTTPStatus.SERVICE_UNAVAILABLE),
    ],
)
def test_health(phase: str | None, code: HTTPStatus) -> None:
    status = None if phase is None else msgspec.structs.replace(STATUS, phase=phase)
    reply = World(status).get("/health")
    assert reply.status == code
    assert msgspec.json.decode(reply.body)["phase"] == (phase or "starting")


def test_live_has_the_status_and_the_spans_after_those_known() -> None:
    world = World()
    first = msgspec.json.decode(world.get("/live.json").body)
    assert msgspec.convert(first["status"], Status) == STATUS
    assert (first["spans"], first["last"]) == ([], None)
    world.spans.keep(SPANS)
    found = msgspec.json.decode(world.get("/live.json", after="0").body)
    assert msgspec.convert(found["spans"][0], StageSpans) == SPANS
    again = msgspec.json.decode(world.get("/live.json", after=str(found["last"])).body)
    assert again["spans"] == []
    for nonsense in ("x", "-1", "9" * 99, ""):
        assert len(msgspec.json.decode(world.get("/live.json", after=nonsense).body)["spans"]) == 1


def test_the_page_is_complete_in_itself() -> None:
    """No address but its own, and nothing that its Content-Security-Policy forbids."""
    world = World()
    texts = {path: world.get(path).body.decode() for path in ("/", "/page.js", "/page.css")}
    for path, text in texts.items():
        assert "//" not in re.sub(r"(?m)^ *//.*$| // .*$", "", text), path
    page = texts["/"]
    for name in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert name == "data:," or f"/{name}" in world.resources, name
    assert not re.search(r"\son\w+=|\sstyle=|<style", page)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", texts["/page.js"])


def test_the_page_names_and_colours_states_as_everything_else() -> None:
    world = World()
    script = world.get("/page.js").body.decode()
    named = re.search(r"STATES = \[(.*?)\]", script)
    coloured = re.search(r"COLOURS = \[(.*?)\]", script)
    assert named is not None
    assert coloured is not None
    assert tuple(re.findall(r"\w+", named[1])) == STATES
    expected = [COLOURS[state].lower() for state in STATES]
    assert re.findall(r"#\w+", coloured[1]) == expected
    styles = world.get("/page.css").body.decode()
    assert [re.search(rf"\.{s} {{ background: (#\w+)", styles)[1] for s in STATES] == expected  # type: ignore[index]
