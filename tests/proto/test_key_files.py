import os
from pathlib import Path

import pytest

from pipemax.proto.curve import make_key_pair
from pipemax.proto.errors import ConfigError
from pipemax.proto.key_files import (
    AllowedClients,
    load_client,
    load_server,
    read_key,
    replace_file,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A system's, with one client `a`, beside what a client has."""
    tmp_path.chmod(0o700)
    server, client = make_key_pair(), make_key_pair()
    (tmp_path / "clients").mkdir()
    replace_file(tmp_path / "server.key", server.secret.encode())
    replace_file(tmp_path / "server.pub", server.public.encode() + b"\n")
    replace_file(tmp_path / "client.key", client.secret.encode() + b"\r\n")
    replace_file(tmp_path / "clients" / "a.pub", client.public.encode())
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    server, client = load_server(folder), load_client(folder)
    assert client.server_public == server.public
    assert AllowedClients(folder).admits(client.own.public)
    assert not AllowedClients(folder).admits(server.public)
    assert (folder / "server.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds no key"),
        (b"short", "holds no key"),
        (b"\xff" * 40, "holds no key"),
        (b"~" * 40, "holds no key"),
        (b"a" * 10_000, "holds no key"),
        (None, "cannot read the key"),
    ],
)
def test_what_is_no_key_is_named(folder: Path, content: bytes | None, text: str) -> None:
    path = folder / "server.key"
    path.unlink()
    if content is not None:
        replace_file(path, content)
    with pytest.raises(ConfigError, match=f"{text}.*") as refused:
        load_server(folder)
    assert str(path) in str(refused.value)


def test_secrets_that_others_could_read_are_not_used(folder: Path) -> None:
    (folder / "server.key").chmod(0o640)
    with pytest.raises(ConfigError, match="readable by others"):
        load_server(folder)
    (folder / "server.key").chmod(0o600)
    folder.chmod(0o755)
    for load in (load_server, load_client):
        with pytest.raises(ConfigError, match="nobody else can enter"):
            load(folder)
    assert read_key(folder / "server.pub", secret=False)


def test_who_is_let_in_is_looked_up_each_time(folder: Path) -> None:
    allowed, new, other = AllowedClients(folder), make_key_pair().public, make_key_pair().public
    old = load_client(folder).own.public
    path = folder / "clients" / "b.pub"
    assert not allowed.admits(new)
    path.write_text(new)
    assert allowed.admits(new)
    os.utime(path, ns=(1, 1))
    path.write_text(other)  # in its place, as an editor may
    assert allowed.admits(other)
    assert not allowed.admits(new)
    path.write_text("no key")
    assert not allowed.admits(other)
    assert allowed.admits(old), "a file that holds no key keeps nobody else out"
    path.rename(path.with_suffix(".off"))
    (folder / "clients" / "a.pub").unlink()
    assert not allowed.admits(old)


def test_without_its_folder_nobody_is_let_in(folder: Path) -> None:
    allowed, key = AllowedClients(folder), load_client(folder).own.public
    assert allowed.admits(key)
    (folder / "clients").rename(folder / "gone")
    assert not allowed.admits(key)
    (folder / "gone").rename(folder / "clients")
    assert allowed.admits(key)
