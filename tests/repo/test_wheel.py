"""What `pip install pipemax` gives, tried in an environment of its own."""

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from support.source_tree import FOLDERS, ROOT

_WHERE = """
import importlib, sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment holding the wheel; its dependencies come from the running one. PipeMax's
    editable install does not: it is a path file, and those count only in an environment's own
    folder."""
    path = tmp_path_factory.mktemp("wheel") / "env"
    venv.create(path, with_pip=False, symlinks=True)
    python = str(path / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
        capture_output=True,
    )
    site = next((path / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return path


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT / folder))
        for folder in FOLDERS
        for path in (ROOT / folder / "pipemax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {f"pipemax/{folder}/py.typed" for folder in FOLDERS} <= names


def test_every_part_is_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    modules = [f"pipemax.{folder}" for folder in FOLDERS]
    where = _run(installed / "bin" / "python", "-c", _WHERE, *modules, cwd=tmp_path).split()
    assert len(where) == len(FOLDERS)
    for path in where:
        assert Path(path).is_relative_to(installed), path


def test_help_and_version(installed: Path, tmp_path: Path) -> None:
    script = _run(installed / "bin" / "pipemax", "--help", cwd=tmp_path)
    module = _run(installed / "bin" / "python", "-m", "pipemax", "--help", cwd=tmp_path)
    assert script == module
    for command in ("up", "down", "status", "run-batch", "demo", "collect-env", "version"):
        assert command in script
    assert importlib.metadata.version("pipemax") in _run(
        installed / "bin" / "pipemax", "version", cwd=tmp_path
    )


def test_the_processes_are_installed(installed: Path, tmp_path: Path) -> None:
    """The launcher starts them by module name."""
    for process in ("coordinator", "kv_daemon", "stage_worker"):
        out = _run(installed / "bin" / "python", "-m", f"pipemax.{process}", "--help", cwd=tmp_path)
        assert "--run-dir" in out
