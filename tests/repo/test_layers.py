"""Imports point one way, the command line stays light, nothing unpickles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from support.source_tree import FOLDERS, ROOT, all_files, imports_of, package_files, relative

MAY_IMPORT = {
    "proto": {"proto"},
    "coordinator": {"coordinator", "proto"},
    "kv_daemon": {"kv_daemon", "proto"},
    "stage_worker": {"stage_worker", "proto"},
    "services": set(FOLDERS),
}
FOLDER_OF = {
    f"pipemax.{entry.stem}": folder
    for folder in FOLDERS
    for entry in (ROOT / folder / "pipemax").iterdir()
    if entry.suffix == ".py" or entry.is_dir()
}
"""Which folder provides `pipemax.<name>`."""

HEAVY = ("torch", "transformers", "numba", "ray", "pyarrow")
LIGHT_MODULES = (
    "pipemax.stage_worker.main",
    "pipemax.stage_worker.modelled.engine",
    "pipemax.services.cli",
    "pipemax.services.serve.command",
    "pipemax.services.bench.command",
    "pipemax.services.bench.parts_command",
    "pipemax.client",
    "pipemax.ray",
    "pipemax.ray.batch",
    "pipemax.coordinator.main",
    "pipemax.kv_daemon.main",
    "pipemax.stage_worker.devices.cuda.list_gpus",
)

BANNED_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "multiprocessing",  # its queues and its processes' arguments are pickled
}
BANNED_CALLS = {"send_pyobj", "recv_pyobj"}
"""pyzmq's convenience methods that pickle."""


def _violations(path: Path) -> list[str]:
    """Imports in `path` of folders that its own folder may not know."""
    own = relative(path).split("/")[0]
    found = []
    for line, name in imports_of(path):
        folder = FOLDER_OF.get(".".join(name.split(".")[:2]))
        if folder is not None and folder not in MAY_IMPORT[own]:
            found.append(f"{relative(path)}:{line} imports {name}")
    return found


def test_folders_import_only_what_they_may() -> None:
    assert [line for path in package_files() for line in _violations(path)] == []


def test_every_part_of_pipemax_is_provided_by_one_folder() -> None:
    names = [
        entry.stem
        for folder in FOLDERS
        for entry in (ROOT / folder / "pipemax").iterdir()
        if entry.name != "__pycache__"
    ]
    assert len(names) == len(set(names))
    assert set(FOLDERS) <= set(names)


def test_the_check_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "coordinator" / "pipemax" / "coordinator" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    from pipemax.stage_worker import main\n")
    monkeypatch.setattr("support.source_tree.ROOT", tmp_path)
    assert _violations(bad) == [
        "coordinator/pipemax/coordinator/bad.py:2 imports pipemax.stage_worker.main"
    ]


def test_the_package_does_not_import_its_tests() -> None:
    found = [
        f"{relative(path)}:{line}"
        for path in package_files()
        for line, name in imports_of(path)
        if name.split(".")[0] in {"tests", "support", "pytest", "hypothesis"}
    ]
    assert found == []


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_starts_without_heavy_libraries(module: str) -> None:
    """`pipemax --help` answers at once, and the coordinator recovers in a moment."""
    code = (
        f"import sys, {module}; "
        f"print(*(name for name in {HEAVY!r} if name in sys.modules), sep=', ')"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert loaded.stdout.strip() == ""


def test_nothing_unpickles() -> None:
    found = [
        f"{relative(path)}:{line} imports {name}"
        for path in package_files()
        for line, name in imports_of(path)
        if name.split(".")[0] in BANNED_MODULES or name == "torch.load"
    ]
    for path in all_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in BANNED_CALLS:
                found.append(f"{relative(path)}:{node.lineno} uses {node.attr}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.append(f"{relative(path)}:{node.value.lineno} names allow_pickle")
    assert found == []


def test_shared_memory_is_ours() -> None:
    """multiprocessing's resource tracker unlinks segments of processes that still live."""
    found = [
        f"{relative(path)}:{line}"
        for path in all_files()
        for line, name in imports_of(path)
        if name.startswith("multiprocessing.shared_memory")
    ]
    assert found == []
