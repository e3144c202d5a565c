"""A batch file with a line of every kind, what becomes of it, and `pipemax` in this process."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipemax.services.cli import main
from support.batch_lines import request, write_lines


def write_source(folder: Path) -> Path:
    """Ten good lines, and one of each kind that is not."""
    return write_lines(
        folder / "in.jsonl",
        *(request(f"id-{n}", "w" * (n + 1)) for n in range(10)),
        b"not JSON",
        b"",
        request("id-3"),
        request("other", model="other"),
        request("refused", "refuse"),
        request("failed", "fail"),
        request("ids", [5, 6, 7]),
        request("negative", max_tokens=-5),
    )


def check_all(lines: list[dict[str, Any]]) -> None:
    """That these are the results of `write_source`."""
    good = {line["custom_id"]: line["response"]["body"] for line in lines if not line["error"]}
    assert set(good) == {*(f"id-{n}" for n in range(10)), "ids"}
    assert good["id-2"]["choices"][0]["text"] == "WWW"
    assert "token_ids" not in good["id-2"]["choices"][0]
    assert good["ids"]["choices"][0]["token_ids"] == [5, 6, 7]
    assert {body["model"] for body in good.values()} == {"fake"}
    assert all(body["created"] > 1.6e9 for body in good.values())
    errors = Counter(
        (line["custom_id"], line["error"]["line"], line["error"]["code"])
        for line in lines
        if line["error"]
    )
    assert errors == {
        (None, 11, "invalid_json"): 1,
        ("id-3", 13, "duplicate_custom_id"): 1,
        ("other", 14, "model_not_found"): 1,
        ("refused", 15, "too_long"): 1,
        ("failed", 16, "failed"): 1,
        ("negative", 18, "invalid_field"): 1,
    }
    statuses = {e["custom_id"]: e["response"]["status_code"] for e in lines if e["error"]}
    assert (statuses["other"], statuses["failed"], statuses["refused"]) == (404, 500, 400)


def pipemax(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pipemax", *map(str, arguments)])
    return main()
