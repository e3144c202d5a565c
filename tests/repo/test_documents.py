"""What the pages say exists: commands, flags, files, links, messages. Nothing here runs them."""

import ast
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from pipemax.services.batch.openai_lines import parse_line
from pipemax.services.cli import app
from support import documents
from support.source_tree import ROOT, relative

CLI: Any = typer.main.get_command(app)
"""Of click, or of the click that newer versions of typer bring with them: hence no types."""
PRESENT = documents.present_pages()
TROUBLESHOOTING = ROOT / "ops" / "docs" / "troubleshooting.md"
ABSENT = {"--trust-remote-code"}
"""Named to say that it does not exist."""
LEAST_FIXED = 8
"""Characters of a message that must be its own: less would be found anywhere."""


def _commands() -> list[documents.Words]:
    return [words for page in PRESENT for words in documents.commands(page) if words.argv]


def _subcommands(command: Any) -> dict[str, Any] | None:
    return getattr(command, "commands", None)


def _options(command: Any) -> dict[str, Any]:
    return {
        name: option
        for option in command.params
        if option.param_type_name == "option"
        for name in (*option.opts, *option.secondary_opts)
    }


def _wrong(argv: tuple[str, ...]) -> list[str]:
    """What `pipemax` would not understand of the words after it."""
    command, words = CLI, list(argv)
    while (subcommands := _subcommands(command)) is not None:
        verb = words.pop(0) if words else ""
        if verb in ("--help", "COMMAND"):
            return []
        found = subcommands.get(verb)
        if found is None:
            return [f"no command {verb!r}"]
        command = found
    return _wrong_words(command, words)


def _wrong_words(command: Any, words: list[str]) -> list[str]:
    options, given, bare = _options(command), set(), 0
    while words:
        word = words.pop(0)
        if word.startswith("-") and word != "-":
            option = options.get(word.split("=")[0])
            if option is None and word != "--help":
                return [f"{command.name} has no {word}"]
            if option is not None:
                given.add(option.name)
                if not option.is_flag and "=" not in word:
                    if not words:
                        return [f"{word} without its value"]
                    words.pop(0)
        elif word != "...":
            bare += 1
        else:
            return []  # the rest is left out
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    missing = [one.name for one in command.params if one.required and one.name not in given]
    missing = [name for name in missing if name not in {one.name for one in arguments}]
    if bare != len(arguments):
        missing.append(f"{len(arguments)} arguments, not {bare}")
    return [f"{command.name} needs {name}" for name in missing]


def test_commands_of_pipemax_exist_with_their_flags() -> None:
    wrong = [
        f"{words.where}: {' '.join(words.argv)}: {problem}"
        for words in _commands()
        if words.argv[0] == "pipemax"
        for problem in _wrong(words.argv[1:])
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "fly",
        "up --modle x",
        "run-batch -i in.jsonl",
        "results -o out.jsonl",
        "jobs night",
        "keys open",
        "up --model",
    ],
)
def test_the_check_sees_what_is_wrong(line: str) -> None:
    assert _wrong(tuple(line.split()))


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = {
        word
        for words in _commands()
        if words.argv[0] == "make"
        for word in words.argv[1:]
        if "=" not in word
    }
    assert {"demo", "test"} <= named <= targets


def test_files_of_the_repository_that_commands_name_exist() -> None:
    missing = [
        f"{words.where}: {word}"
        for words in _commands()
        for word in words.argv
        if word.startswith("ops/") and "OUT" not in word and not (ROOT / word).exists()
    ]
    assert missing == []


def test_extras_that_are_named_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        extra
        for page in PRESENT
        for extra in re.findall(r"(?:pipemax|\.)\[([a-z0-9]+)\]", page.read_text())
    }
    assert {"serve", "ray"} <= named <= set(known["optional-dependencies"])


def _all_flags(command: Any) -> set[str]:
    subcommands = _subcommands(command)
    if subcommands is None:
        return set(_options(command))
    return {flag for one in subcommands.values() for flag in _all_flags(one)}


def test_flags_that_are_named_exist() -> None:
    """In running text a flag stands alone, or behind the command whose it is."""
    of_scripts = {
        flag
        for path in (ROOT / "ops").rglob("*.py")
        for flag in re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text())
    }
    known = _all_flags(CLI) | of_scripts | {"--help"} | ABSENT
    wrong = [
        f"{relative(page)}: {flag}"
        for page in PRESENT
        for span in documents.code_spans(page)
        if span.startswith(("--", "pipemax "))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
        if flag not in known and not flag.endswith("-")
    ]
    assert wrong == []


def test_commands_in_running_text_exist() -> None:
    wrong = [
        f"{relative(page)}: {span}: {problem}"
        for page in PRESENT
        for span in documents.code_spans(page)
        if re.match(r"pipemax [a-z-]+( |$)", span)
        for problem in _wrong(tuple(span.split()[1:]))
        if "needs" not in problem and "without its value" not in problem
    ]
    assert wrong == []


def test_python_in_pages_names_what_there_is() -> None:
    for page in PRESENT:
        for block in documents.python_blocks(page):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pipemax"):
                    module = importlib.import_module(str(node.module))
                    assert [a.name for a in node.names if not hasattr(module, a.name)] == []


def test_batch_lines_in_pages_are_understood() -> None:
    found = [line for page in PRESENT for line in documents.batch_lines(page)]
    assert found
    for line in found:
        parse_line(line.encode(), "demo")


def test_links_lead_somewhere() -> None:
    broken = []
    for page in documents.pages():
        for target in documents.links(page):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in documents.anchors(file)):
                broken.append(f"{relative(page)}: {target}")
    assert broken == []


def test_every_page_is_found_from_the_first() -> None:
    found, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in found and page.suffix == ".md":
            found.add(page)
            paths = [target.partition("#")[0] for target in documents.links(page)]
            todo += [(page.parent / path).resolve() for path in paths if path]
    lost = set(PRESENT) - found
    assert [relative(page) for page in lost] == []


def test_messages_that_are_explained_are_told() -> None:
    quoted = documents.quoted_messages(TROUBLESHOOTING)
    assert len(quoted) > 50
    templates = documents.message_templates()
    assert [message for message in quoted if not documents.is_told(message, templates)] == []
    short = [m for m in quoted if max(map(len, m.split("…"))) < LEAST_FIXED]
    assert short == []


def test_codes_of_error_lines_are_explained_and_there() -> None:
    explained = documents.explained_codes(TROUBLESHOOTING)
    given = documents.codes_given(
        "services/pipemax/services/batch", "coordinator/pipemax/coordinator/text"
    )
    assert {"invalid_json", "too_long"} <= given <= explained
    assert explained - given <= documents.message_templates()


def test_messages_that_nobody_tells_are_seen() -> None:
    templates = {f"no system named {documents.PLACEHOLDER} is running; start one with `up`"}
    assert documents.is_told("no system named … is running; start", templates)
    assert not documents.is_told("no system called … is running", templates)
    assert not documents.is_told("is running … no system named", templates)
