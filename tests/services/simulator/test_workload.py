"""Lengths of requests."""

import json
from pathlib import Path

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.services.simulator.workload import (
    Lengths,
    Workload,
    lognormal,
    parse_workload,
    total_tokens,
)


def test_means_are_as_asked_for() -> None:
    workload = parse_workload("ShareGPT", 20_000, seed=3, sigma=0.8)
    assert workload.mean_in == pytest.approx(343.76, rel=0.03)
    assert workload.mean_out == pytest.approx(237.2, rel=0.03)
    assert workload == parse_workload("sharegpt", 20_000, seed=3, sigma=0.8)
    assert workload != parse_workload("sharegpt", 20_000, seed=4, sigma=0.8)
    assert parse_workload("30,20", 2, 0, sigma=0).requests == (Lengths(30, 20), Lengths(30, 20))


def test_long_outputs_count_more_often_in_the_context() -> None:
    workload = Workload("two", (Lengths(100, 10), Lengths(200, 90)))
    assert workload.mean_decode_context == (10 * 105 + 90 * 245) / 100
    assert workload.max_model_len == 290
    assert total_tokens(workload.requests) == 400


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    lines = [json.dumps({"prompt_tokens": n, "output_tokens": 2 * n}) for n in (3, 4, 5)]
    path.write_text("\n".join(lines) + "\n\n")
    assert parse_workload(str(path), 2, 0, 1).requests == (Lengths(3, 6), Lengths(4, 8))


def test_a_request_may_state_what_it_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(
        '{"prompt_tokens": 3, "output_tokens": 6, "max_tokens": 9}\n'
        '{"prompt_tokens": 4, "output_tokens": 8}\n'
    )
    workload = parse_workload(str(path), 2, 0, 1)
    assert [request.max_tokens for request in workload.requests] == [9, None]
    assert (workload.max_tokens, workload.max_model_len) == (8, 12)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt_tokens": 3, "output_tokens": 6, "max_tokens": 5}', "is less than"),
        ('{"prompt_tokens": 3}', ":1: each line holds an object"),
        ('{"prompt_tokens": 3, "output_tokens": 0}', "at least 1, not"),
        ('{"prompt_tokens": true, "output_tokens": 1}', "at least 1, not"),
        ("no", ":1: each line"),
        ("", "holds no requests"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=r"lengths\.jsonl") as found:
        parse_workload(str(path), 10, 0, 1)
    assert reason in str(found.value)


@pytest.mark.parametrize("text", ["nothing", "0,5", "a,b"])
def test_unknown_workloads_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="workload"):
        parse_workload(text, 10, 0, 1)


def test_nonsense_means_are_refused() -> None:
    with pytest.raises(ConfigError, match="makes no sense"):
        lognormal("x", 10, 10, 0, seed=0)
