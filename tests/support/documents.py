"""The repository's pages as data, for tests of what they promise."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.source_tree import ROOT, package_files, relative

HISTORY = ("CHANGELOG.md", "ops/benchmarks/")
"""Pages about how things were: their commands need not exist any more."""
PLACEHOLDER = "\0"
"""In a message's template, what is filled in when it is told."""

_SEPARATORS = {"|", "||", "&&", ";", "&"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def pages() -> list[Path]:
    """Every page that people read, wherever it lies."""
    below = ("coordinator", "kv_daemon", "ops", "proto", "services", "stage_worker")
    found = sorted(ROOT.glob("*.md"))
    return found + [page for folder in below for page in sorted((ROOT / folder).rglob("*.md"))]


def present_pages() -> list[Path]:
    """Those about how things are."""
    return [page for page in pages() if not relative(page).startswith(HISTORY)]


@dataclass(frozen=True, slots=True)
class Words:
    """One command of a page, as a shell would split it."""

    where: str
    argv: tuple[str, ...]


def commands(page: Path) -> Iterator[Words]:
    """What follows `$ ` in blocks of the language `console`, joined where a line ends in `\\`."""
    for language, block in _FENCE.findall(page.read_text()):
        if language != "console":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                yield from _split(relative(page), line[2:])


def _split(where: str, line: str) -> Iterator[Words]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    argv: list[str] = []
    for word in lexer:
        if word in _SEPARATORS:
            yield Words(where, tuple(argv))
            argv = []
        else:
            argv.append(word)
    if argv:
        yield Words(where, tuple(argv))


def batch_lines(page: Path) -> list[str]:
    """What examples write into a batch file."""
    blocks = [block for _, block in _FENCE.findall(page.read_text())]
    return [line for block in blocks for line in block.splitlines() if line.startswith('{"custom')]


def python_blocks(page: Path) -> list[str]:
    return [block for language, block in _FENCE.findall(page.read_text()) if language == "python"]


def code_spans(page: Path) -> list[str]:
    """Inline code."""
    return _CODE.findall(_FENCE.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """Targets of links to files and headings of the repository."""
    found = _LINK.findall(_FENCE.sub("", page.read_text()))
    return [target for target in found if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, made as the usual viewers make them."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def quoted_messages(page: Path) -> list[str]:
    """First cells of tables whose first column is `message`; `…` stands for what is filled in."""
    found, inside = [], False
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == "message":
            inside = True
        elif inside and not set(cells[0]) <= set("-: "):
            found += _CODE.findall(cells[0])
    return found


def explained_codes(page: Path) -> set[str]:
    """First cells of its table of codes."""
    rows = re.search(r"^\| code \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    lines = rows.group(1).splitlines() if rows else []
    return {code for line in lines for code in _CODE.findall(line.split("|")[1])}


def codes_given(*folders: str) -> set[str]:
    """With which requests are refused in the modules of these folders."""
    calls = [
        node
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
    ]
    return {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id in ("LineError", "RequestError")
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def message_templates() -> set[str]:
    """Every string that the package could tell somebody, with PLACEHOLDER where an expression
    stands. Docstrings are none."""
    found, docstrings = set(), set()
    for path in package_files():
        for node in ast.walk(ast.parse(path.read_text())):  # parents come before their children
            match node:
                case ast.Expr(ast.Constant(str()) as docstring):
                    docstrings.add(docstring)
                case ast.JoinedStr(parts):
                    found.add("".join(map(_literal, parts)))
                case ast.Constant(str(text)) if node not in docstrings:
                    found.add(text)
    return found


def _literal(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER


def is_told(message: str, templates: set[str]) -> bool:
    """Whether one template has the fixed parts of `message`, in their order."""
    parts = [part.strip() for part in message.split("…")]
    longest = max(parts, key=len)
    pattern = re.compile(".*?".join(re.escape(part) for part in parts), re.DOTALL)
    return any(longest in text and pattern.search(text) for text in templates)
