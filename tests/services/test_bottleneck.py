"""Which place holds the pipeline up, from shares of time."""

from typing import Any

import msgspec
import pytest

from pipemax.proto.messages.ingest import SamplerStatus, StageStatus, Status
from pipemax.proto.states import STATES
from pipemax.services.bottleneck import Bottleneck, bottleneck

SPAN_S = 10.0


def looks(*stages: dict[str, float], **changes: Any) -> tuple[Status, Status]:
    """Two, between which stages spent these shares of their time, and the rest on waiting for
    plans."""
    zeros = dict.fromkeys(Status.__struct_fields__, 0)
    known = {"instance_id": "i", "phase": "ready", "model_name": "m", "missing": ()}
    then = tuple(
        StageStatus(
            stage=index, pid=1, layers=(0, 1), steps=0, activation_transport="shm",
            state_seconds=dict.fromkeys(STATES, 100.0),
        )
        for index in range(len(stages))
    )  # fmt: skip
    before = Status(
        **(zeros | known | {"stages": then, "samplers": (), "jobs": (), "slots": ()}),
    )
    now = tuple(
        msgspec.structs.replace(
            stage,
            state_seconds={
                state: 100.0
                + SPAN_S
                * shares.get(state, 1 - sum(shares.values()) if state == "wait_plan" else 0)
                for state in STATES
            },
        )
        for stage, shares in zip(then, stages, strict=True)
    )
    grown = {"stages": now, "uptime_s": SPAN_S, "requests_running": 3, **changes}
    return before, msgspec.structs.replace(before, **grown)


@pytest.mark.parametrize(
    ("stages", "changes", "expected"),
    [
        # The fullest, though others compute for longer than they wait too.
        ([{"compute": 0.7}, {"compute": 0.9}], {}, ("stage 1", "compute")),
        # Late KV is the stage's own, however little it computes.
        ([{"compute": 0.3}, {"compute": 0.2, "wait_kv": 0.7}], {}, ("stage 1", "wait_kv")),
        ([{"send": 0.4, "prepare": 0.3}], {}, ("stage 0", "send")),
        # Stages wait, and not for each other.
        ([{"compute": 0.2}], {"coordinator_busy_seconds": 9.0}, ("coordinator", "busy")),
        (
            [{"compute": 0.2}],
            {"samplers": (SamplerStatus(
                sampler=0, pid=1, rows=1, state_seconds={"sample": 8.0, "wait": 2.0}
            ),)},
            ("sampler 0", "sample"),
        ),
        # Behind the slow hop they wait for rows, before it for plans.
        (
            [{"compute": 0.1}, {"compute": 0.1}, {"wait_activation": 0.9}, {"send": 0.1}],
            {},
            ("stage 1 to stage 2", "wait_activation"),
        ),
        # A stage that is full explains why the coordinator is, not the other way round.
        ([{"compute": 0.9}], {"coordinator_busy_seconds": 9.0}, ("stage 0", "compute")),
    ],
)  # fmt: skip
def test_one_place_is_named(
    stages: list[dict[str, float]], changes: dict[str, Any], expected: tuple[str, str]
) -> None:
    found = bottleneck(*looks(*stages, **changes))
    assert found is not None
    assert (found.where, found.state) == expected


def test_its_share_is_told() -> None:
    assert bottleneck(*looks({"compute": 0.75})) == Bottleneck("stage 0", "compute", 0.75)


def test_none_where_there_is_too_little_work_or_nothing_to_compare() -> None:
    before, after = looks({"compute": 0.3}, {"compute": 0.2})
    assert bottleneck(before, after) is None
    before, after = looks({"compute": 0.9}, requests_running=0)
    assert bottleneck(before, after) is None
    before, after = looks({"compute": 0.9}, instance_id="j")
    assert bottleneck(before, after) is None
    assert bottleneck(before, before) is None
