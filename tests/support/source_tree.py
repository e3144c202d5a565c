"""The repository as data, for tests about the code itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("services", "stage_worker", "kv_daemon", "coordinator", "proto")
"""The folders that make up the package `pipemax`."""


def package_files() -> list[Path]:
    """Every Python file that gets installed."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def all_files() -> list[Path]:
    """Every Python file of the repository."""
    folders = (*FOLDERS, "tests", "ops")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything `path` imports, also inside functions. `from a import b`
    gives `a.b`: `b` may be a module."""
    package = relative(path).split("/")[1:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"
