"""Batches as Ray Data hands them over: lines out of them, results into them."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipemax.proto.errors import ConfigError
from pipemax.ray.columns import RESULT_COLUMNS, Result, request_texts, with_results
from pipemax.services.batch import inputs
from support.batch_lines import request

REQUESTS = [request("a", [1, 2]), request("b", "water", stop=["x", "y"])]
LINES = [json.dumps(one) for one in REQUESTS]


def result(custom_id: str | None, **changes: Any) -> Result:
    values: dict[str, Any] = {"custom_id": custom_id, "status_code": 200, "text": "WATER"}
    values |= {"error": None, "error_code": None, "prompt_tokens": 5, "output_tokens": 6}
    return Result(**values | {"result": f"line of {custom_id}"} | changes)


RESULTS = [result("a"), result("b", text=None, error="why", error_code="failed", status_code=500)]


def parsed(batch: Any) -> list[Any]:
    return [json.loads(text or b"null") for text in request_texts(batch)]


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()])
def test_lines_of_a_table(kind: Any) -> None:
    assert parsed(pa.table({"line": pa.array(LINES).cast(kind)})) == REQUESTS


def test_lines_of_numpy() -> None:
    assert parsed({"line": np.array(LINES, dtype=object)}) == REQUESTS


def test_columns_of_a_table() -> None:
    """Rows share the fields of their bodies: what one does not have is null."""
    assert parsed(pa.Table.from_pylist([REQUESTS[1]])) == [REQUESTS[1]]
    bodies = [{"model": "m", "prompt": "p", "seed": 1}, {"model": "m", "prompt": "q"}]
    rows = [one | {"body": body} for one, body in zip(REQUESTS, bodies, strict=True)]
    assert [row["body"] for row in parsed(pa.Table.from_pylist(rows))] == bodies


def test_columns_of_numpy() -> None:
    """Whose values hold numpy's types at any depth."""
    body = {"prompt": np.array([1, 2]), "stop": np.array(["x"], dtype=object), "n": np.int64(2)}
    batch = {
        "custom_id": np.array(["a"], dtype=object),
        "method": np.array(["POST"], dtype=object),
        "url": np.array(["/v1/completions"], dtype=object),
        "body": np.array([body], dtype=object),
    }
    (found,) = parsed(batch)
    assert found["body"] == {"prompt": [1, 2], "stop": ["x"], "n": 2}


def test_a_line_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipemax.ray.columns.MAX_LINE_BYTES", 10)
    assert request_texts({"line": ["x" * 11, "y" * 10]}) == [None, b"y" * 10]
    assert inputs.MAX_LINE_BYTES > 10


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"text": LINES}, "not \\['custom_id', 'method', 'url', 'body'\\]"),
        ({"line": LINES, "error": ["a", "b"]}, "columns \\['error'\\] are those of results"),
        ("lines", "a batch is a str; give map_batches batch_format"),
    ],
)
def test_what_is_no_batch(batch: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        request_texts(batch)


def test_results_take_the_place_of_lines() -> None:
    table = pa.table({"place": [7, 8], "line": LINES})
    made = with_results(table, RESULTS)
    assert made.column_names == ["place", *RESULT_COLUMNS]
    assert made.column("place").to_pylist() == [7, 8]
    assert made.column("error").to_pylist() == [None, "why"]
    assert made.column("status_code").to_pylist() == [200, 500]
    numpy = with_results({"place": np.array([7, 8]), "line": LINES}, RESULTS)
    assert list(numpy) == made.column_names
    assert numpy["result"] == ["line of a", "line of b"]


def test_tables_of_results_have_one_schema() -> None:
    """Also one in which nothing failed: Ray joins them."""
    table = pa.table({"line": LINES[:1]})
    schemas = [with_results(table, [one]).schema for one in RESULTS]
    assert schemas[0] == schemas[1]
    assert pa.null() not in schemas[0].types
