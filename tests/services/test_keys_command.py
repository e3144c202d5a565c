"""`pipemax keys`, and the flags of `up` that need what it makes."""

import sys
from pathlib import Path

import pytest

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.key_files import load_client, load_server
from pipemax.services.cli import main
from pipemax.services.serving_config import ServingOptions, serving_config

CONFIG = EngineConfig(model="m", served_model_name="m", layer_split=(1,), max_model_len=8)


def pipemax(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pipemax", *map(str, arguments)])
    return main()


def test_from_a_new_folder_to_a_client_that_is_let_in_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep" / "keys"
    assert pipemax(monkeypatch, "keys", "init", "--keys", folder) == 0
    monkeypatch.setenv("PIPEMAX_KEYS", str(folder))
    assert pipemax(monkeypatch, "keys", "add", "laptop") == 0
    issued = Path(capsys.readouterr().out.strip())
    modes = {path: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    assert {modes[path] for path in modes if path.is_dir()} == {0o700}
    assert {modes[path] for path in modes if path.is_file()} == {0o600}
    own, server = load_client(issued), load_server(folder)
    assert own.server_public == server.public
    assert pipemax(monkeypatch, "keys", "list") == 0
    out, err = capsys.readouterr()
    assert "laptop" in out
    assert own.own.public in out
    assert "server.key (secret)" in err
    for secret in (own.own.secret, server.secret):
        assert secret not in out + err
    assert pipemax(monkeypatch, "keys", "add", "laptop") == 2
    assert "already" in capsys.readouterr().err
    assert pipemax(monkeypatch, "keys", "init") == 2
    assert "has a server key already" in capsys.readouterr().err
    assert load_server(folder) == server
    assert pipemax(monkeypatch, "keys", "remove", "laptop") == 0
    assert not issued.exists()
    assert pipemax(monkeypatch, "keys", "remove", "laptop") == 2
    assert pipemax(monkeypatch, "keys", "list") == 0
    assert "nobody is let in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a" * 65, "a b"])
def test_what_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert pipemax(monkeypatch, "keys", "init", "--keys", tmp_path / "k") == 0
    for verb in ("add", "remove"):
        assert pipemax(monkeypatch, "keys", verb, "--keys", tmp_path / "k", "--", name) == 2


def test_what_a_system_serves_is_checked_before_it_starts(tmp_path: Path) -> None:
    from pipemax.services import keys

    keys.create(tmp_path / "k")
    there = ServingOptions("tcp://0.0.0.0:5700", tmp_path / "k", 7, "1GiB")
    config = serving_config(there, CONFIG)
    assert (config.listen, config.keys_dir) == ("tcp://0.0.0.0:5700", str(tmp_path / "k"))
    assert (config.max_jobs, config.max_journal_bytes) == (7, 2**30)
    plain = ServingOptions(None, None, 1000, "256GiB")
    assert serving_config(plain, CONFIG) == CONFIG


@pytest.mark.parametrize(
    ("listen", "keys", "max_jobs", "size", "text"),
    [
        ("tcp://0.0.0.0:5700", None, 1, "1GiB", "needs --keys DIR: plain TCP is refused"),
        (None, "/k", 1, "1GiB", "--keys /k goes with --listen"),
        ("0.0.0.0:5700", "/k", 1, "1GiB", "write tcp://HOST:PORT"),
        ("tcp://0.0.0.0:65536", "/k", 1, "1GiB", "write tcp://HOST:PORT"),
        ("ipc:///tmp/x", "/k", 1, "1GiB", "write tcp://HOST:PORT"),
        ("tcp://0.0.0.0:1", "/no/such", 1, "1GiB", "no key folder /no/such"),
        (None, None, 0, "1GiB", "--max-jobs 0"),
        (None, None, 100_001, "1GiB", "--max-jobs 100001"),
        (None, None, 1, "1KiB", "--max-journal-size 1024"),
        (None, None, 1, "much", "--max-journal-size: "),
    ],
)
def test_what_a_system_cannot_serve_is_refused_by_flag(
    listen: str | None, keys: str | None, max_jobs: int, size: str, text: str
) -> None:
    options = ServingOptions(listen, None if keys is None else Path(keys), max_jobs, size)
    with pytest.raises(ConfigError, match=f"^{text}|{text}"):
        serving_config(options, CONFIG)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--connect", "tcp://h:1", "--name", "x"), "is a system of this machine"),
        (("--keys", "k"), "--keys k goes with --connect"),
        (("--connect", "tcp://h:1"), "plain TCP is refused"),
        (("--connect", "h:1", "--keys", "k"), "write tcp://HOST:PORT"),
    ],
)
def test_flags_that_contradict_each_other(
    arguments: tuple[str, ...],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for verb in (("status",), ("jobs",), ("cancel", "a"), ("results", "a", "-o", "/dev/null")):
        assert pipemax(monkeypatch, *verb, *arguments) == 2
        assert text in capsys.readouterr().err
    lines = ("run-batch", "-i", __file__, "-o", "/dev/null")
    assert pipemax(monkeypatch, *lines, *arguments) == 2
    assert text in capsys.readouterr().err
