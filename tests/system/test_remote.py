"""A system that listens on TCP, and commands as from another machine: no run directory, no state
folder, no launcher; an address and a key folder."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from pipemax.services import keys
from pipemax.services.cli import main
from support.batch_lines import read_lines, request, write_lines
from support.command import Up, run_pipemax

MODELLED = ("--device", "modelled:l20", "--model", "llama-2-13b", "--modelled-time-scale", 0.001,
            "--warm-up-s", 0, "--served-model-name", "fake")  # fmt: skip

PRIVATE = "xyzzy plugh"
BAD = (
    request("long", PRIVATE * 20_000),
    request("grammar", "a", structured_outputs={"regex": f"({PRIVATE}"}),
    request("field", "a", stop=[PRIVATE, 7]),
    request("unknown", "a", **{PRIVATE: PRIVATE}),
    request("over", PRIVATE, max_tokens=10**6),
)
"""Lines that name what they hold in their errors."""


def test_commands_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipemax = Commands(monkeypatch, capsys)
    folder, lines, out = tmp_path / "keys", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [request(f"id-{n}", [5, 6, n + 7], max_tokens=4) for n in range(19)]
    write_lines(lines, *good, request("id-19", PRIVATE, max_tokens=4, stop=[PRIVATE]))
    write_lines(tmp_path / "bad.jsonl", *BAD)
    keys.create(folder)
    laptop, stranger = keys.add(folder, "laptop"), keys.add(folder, "stranger")
    (folder / "clients" / "stranger.pub").unlink()
    with Up(*MODELLED, "--listen", "tcp://127.0.0.1:0", "--keys", folder) as up:
        found = re.search(r"other machines connect to (tcp://\S+);", up.ready_line)
        assert found is not None
        here = os.environ["PIPEMAX_RUNTIME_DIR"]
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(mode=0o700)
        for name in ("PIPEMAX_RUNTIME_DIR", "PIPEMAX_STATE_DIR"):
            monkeypatch.setenv(name, str(elsewhere))
        try:
            check_flags(pipemax, found[1], laptop, stranger, lines, out)
            monkeypatch.setenv("PIPEMAX_CONNECT", found[1])
            monkeypatch.setenv("PIPEMAX_KEYS", str(laptop))
            check_environment(pipemax, lines, tmp_path / "night.jsonl")
        finally:
            monkeypatch.setenv("PIPEMAX_RUNTIME_DIR", here)
        assert list(elsewhere.iterdir()) == [], "nothing of a system elsewhere is kept here"
        check_logs(Path(here), *folder.rglob("*.key"), laptop / "client.key")


class Commands:
    """In this process, which has no system: one is as good as another machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit status, output and errors of one."""
        self._monkeypatch.setattr(sys, "argv", ["pipemax", *map(str, arguments)])
        status = main()
        return (status, *self._capsys.readouterr())


def check_flags(
    pipemax: Commands, address: str, laptop: Path, stranger: Path, lines: Path, out: Path
) -> None:
    there = ("--connect", address, "--keys")
    done = run_pipemax("run-batch", "-i", lines, "-o", out, *there, laptop)
    assert done.returncode == 0, done.stderr
    bad = out.with_name("bad.out")
    status, _, _ = pipemax("run-batch", "-i", out.with_name("bad.jsonl"), "-o", bad, *there, laptop)
    assert (status, len(read_lines(bad))) == (1, len(BAD))
    results = read_lines(out)
    assert {line["custom_id"] for line in results} == {f"id-{n}" for n in range(20)}
    assert all(line["error"] is None for line in results)
    status, _, said = pipemax("run-batch", "-i", lines, "-o", out, *there, laptop)
    assert (status, "every line has its result already" in said) == (0, True)
    other = out.with_suffix(".x")
    status, _, said = pipemax("run-batch", "-i", lines, "-o", other, *there, stranger)
    assert status == 1
    assert "does not admit the key" in said
    assert len(said.splitlines()) == 1
    status, _, said = pipemax("status", "--connect", address)
    assert (status, "plain TCP is refused" in said) == (2, True)


def check_logs(runtime_dir: Path, *secrets: Path) -> None:
    """Neither keys nor what people wrote is in what the processes print at their default level."""
    said = "".join(path.read_text() for path in runtime_dir.glob("*/logs/*.log"))
    assert "turned away" in said, "these are the logs"
    assert PRIVATE not in said
    for path in secrets:
        assert path.read_text().strip() not in said


def check_environment(pipemax: Commands, lines: Path, out: Path) -> None:
    assert json.loads(pipemax("status", "--json")[1])["requests_finished"] == 20
    assert pipemax("submit", "-i", lines, "--job", "night")[0] == 0
    assert pipemax("results", "night", "-o", out, "--follow")[0] == 0
    assert len(read_lines(out)) == 20
    (job,) = json.loads(pipemax("jobs", "--json")[1])
    assert (job["name"], job["state"]) == ("night", "finished")
    assert "night is finished" in pipemax("cancel", "night")[1]
