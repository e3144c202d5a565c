"""The shape of the repository."""

import ast
import importlib.metadata
import tomllib

from support.source_tree import FOLDERS, ROOT, all_files, package_files, relative

MAX_LINES = 500


def test_no_file_is_longer_than_a_head_holds() -> None:
    long = {
        relative(path): lines
        for path in all_files()
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


def test_pipemax_is_a_namespace() -> None:
    """With an `__init__.py` in one folder, `pipemax` would be that folder alone."""
    for folder in FOLDERS:
        assert not (ROOT / folder / "__init__.py").exists(), folder
        assert not (ROOT / folder / "pipemax" / "__init__.py").exists(), folder


def test_packages_below_the_namespace_are_complete() -> None:
    """A folder without `__init__.py` is not installed as a package by every tool."""
    for path in package_files():
        package = path.parent
        if package.name != "pipemax":
            assert (package / "__init__.py").exists(), relative(package)


def test_tests_mirror_the_tree() -> None:
    folders = {
        entry.name for entry in (ROOT / "tests").iterdir() if any(entry.glob("**/test_*.py"))
    }
    assert folders <= {*FOLDERS, "ops", "repo", "system", "gpu"}


def test_every_module_says_what_it_is() -> None:
    undocumented = [
        relative(path)
        for path in package_files()
        if path.name not in ("__init__.py", "__main__.py")
        and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert undocumented == []


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("pipemax") == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_cuda_extras_exclude_each_other() -> None:
    """Both wheels hold the module `cupy`."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"cuda12", "cuda13"} <= set(tables["project"]["optional-dependencies"])
    assert tables["tool"]["uv"]["conflicts"] == [[{"extra": "cuda12"}, {"extra": "cuda13"}]]
