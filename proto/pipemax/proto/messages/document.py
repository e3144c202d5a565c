"""Writes `proto/README.md` from the registry: `python -m pipemax.proto.messages.document`.

The page cannot fall behind the code, because a test compares the two.
"""

import ast
import inspect
import sys
import textwrap
from types import ModuleType

from pipemax.proto import PROTOCOL_VERSION, memory
from pipemax.proto.messages import (
    activations,
    control,
    ingest,
    kv,
    logits,
    sampling,
    spans,
    status,
    types,
)
from pipemax.proto.messages.registry import CHANNELS, REPORTS, Channel
from pipemax.proto.messages.types import Message
from pipemax.proto.sizes import format_size

_HEAD = """\
# The protocol

Everything that crosses a process boundary, version {version}. This page is written by
`python -m pipemax.proto.messages.document`; change the code, not the page.

**On the wire** a message is one ZeroMQ frame that holds one [MessagePack](https://msgpack.org) map
with string keys. The key `type` names the message, the other keys are its fields. A field with a
default may be left out; a field that is not listed here is refused, and so is a wrong type, a
number out of range, a byte too many or too few. Any language with ZeroMQ and MessagePack can speak
it. No message is pickled, no message carries code.

**Sockets** are `ipc://` files in the run directory, which only its owner can enter. The binder
has a ROUTER, peers have a DEALER. The processes of the system connect under fixed identities
(`stage-0`, `sampler-0`, `kv_daemon`, `launcher`), clients under any. A message above the limit
closes the connection it came on; a connection that does not finish the ZeroMQ handshake within 3 s
is closed.
With `--listen` the `ingest` socket is on TCP as well, encrypted with CURVE; a ZAP handler admits
the keys of the key folder and no others. With `--activation-transport tcp` the `act` sockets are
TCP, encrypted with CURVE keys from the run directory, and `activation_ready` has a second frame
that holds the rows.
`reports` is `control` a second time, towards the coordinator only: what need not wake it, StepDone
and what comes with every beat from all stages but the last.

**A client** sends `client_hello`, gets `server_hello`, then sends `submit` as often as it likes (up
to `credits` unfinished requests) and gets one `finished` or `refused` for each, in any order.

**A job** outlives its client, the coordinator and the system: `open_job`, `add_requests` as often
as needed, `close_job`, and later, from anywhere, `fetch_results` page by page. Each message gets
one answer with its `number` and may be sent again when none comes.

| socket | bound by | connected by | largest message |
|---|---|---|---|
"""

_NUMBERED = {"act": "-<s>", "logits": "-<i>"}
"""Channels of which there are several, and how their sockets are told apart."""


def render() -> str:
    """The whole page, as Markdown."""
    lines = [_HEAD.format(version=PROTOCOL_VERSION).rstrip("\n")]
    for channel in (*CHANNELS, REPORTS):
        limit = format_size(channel.max_message_bytes).replace(".0 ", " ")
        name = channel.name + _NUMBERED.get(channel.name, "")
        lines.append(f"| `{name}` | {channel.binder} | {channel.peers} | {limit} |")
    for channel in CHANNELS:
        lines += _channel_section(channel)
    lines += _section("Parts of messages", "part", _part_rows())
    lines += [
        "",
        "`SweepSample`, `SampleRow` and `BlockMove` travel as arrays: their fields in this order, "
        "without names.",
    ]
    lines += _alias_section()
    return "\n".join(lines) + "\n"


def _channel_section(channel: Channel) -> list[str]:
    rows = [(message, f"to {channel.binder}") for message in channel.to_binder]
    rows += [(message, f"from {channel.binder}") for message in channel.to_peer]
    lines = ["", f"## `{channel.name}`", "", "| type | direction | fields | meaning |"]
    lines.append("|---|---|---|---|")
    for message, direction in rows:
        tag = message.__struct_config__.tag
        lines.append(f"| `{tag}` | {direction} | {_fields(message)} | {_meaning(message)} |")
    return lines


def _section(title: str, column: str, rows: list[tuple[str, str, str]]) -> list[str]:
    lines = ["", f"## {title}", "", f"| {column} | fields | meaning |", "|---|---|---|"]
    return lines + [f"| `{name}` | {fields} | {meaning} |" for name, fields, meaning in rows]


def _part_rows() -> list[tuple[str, str, str]]:
    """Structs that are fields of messages, in the order of their definition."""
    rows = []
    for module in (memory, sampling, ingest, status, control, kv, activations, logits):
        for part in _structs_of(module):
            if not issubclass(part, Message):
                rows.append((part.__name__, _fields(part), _meaning(part)))
    return rows


def _structs_of(module: ModuleType) -> list[type]:
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and hasattr(value, "__struct_fields__")
    ]


def _fields(struct: type) -> str:
    """`name: type = default — docstring`, field by field, as written in the source: the names of
    the types say more there than what they stand for."""
    body = ast.parse(textwrap.dedent(inspect.getsource(struct))).body[0]
    assert isinstance(body, ast.ClassDef)
    fields: list[str] = []
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign):
            text = f"{ast.unparse(statement.target)}: {ast.unparse(statement.annotation)}"
            if statement.value is not None:
                text += f" = {_default(statement.value)}"
            fields.append(f"`{text}`".replace("|", "\\|"))
        elif (
            isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and fields
        ):
            fields[-1] += f" — {_one_line(str(statement.value.value)).rstrip('.')}"
    return "<br>".join(fields) or "none"


def _default(value: ast.expr) -> str:
    """`field(default_factory=dict)` reads `dict()`."""
    if isinstance(value, ast.Call) and value.keywords and ast.unparse(value.func).endswith("field"):
        return f"{ast.unparse(value.keywords[0].value)}()"
    return ast.unparse(value)


def _meaning(struct: type) -> str:
    return _one_line(inspect.getdoc(struct) or "")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _alias_section() -> list[str]:
    """Named field types and what they stand for."""
    lines = ["", "## Field types", "", "| name | stands for |", "|---|---|"]
    for module in (types, sampling, ingest, spans):
        for statement in ast.parse(inspect.getsource(module)).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                stands_for = ast.unparse(statement.value).replace("|", "\\|")
                lines.append(f"| `{statement.targets[0].id}` | `{stands_for}` |")
    lines += [
        "",
        "An `I32` is a MessagePack binary holding a column of little-endian 32-bit integers.",
    ]
    return lines


if __name__ == "__main__":
    sys.stdout.write(render())
