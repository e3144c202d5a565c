"""Batches of Ray Data: lines in them, results into them."""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipemax.proto.errors import ConfigError
from pipemax.services.batch.inputs import COLUMNS, MAX_LINE_BYTES, row_text

LINE = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a line came to; its fields are the columns of a row out."""

    custom_id: str | None
    """None where it could not be read."""
    status_code: int
    """As HTTP would have it; 200 for a request that was served."""
    text: str | None
    """Of the first choice."""
    error: str | None
    """Why the line was not served."""
    error_code: str | None
    """Short and stable, for programs."""
    prompt_tokens: int
    output_tokens: int
    """Of all choices."""
    result: str
    """The whole output line, as `run-batch` writes it."""


RESULT_COLUMNS = tuple(field.name for field in fields(Result))
_OF_STRINGS = frozenset(("custom_id", "text", "error", "error_code", "result"))


def request_texts(batch: Any) -> list[bytes | None]:
    """The lines of a pyarrow Table or a mapping of columns; None for one that is too long. Raises
    ConfigError when the columns are not a line's."""
    names = _names(batch)
    wanted = (LINE,) if LINE in names else COLUMNS
    if missing := [name for name in wanted if name not in names]:
        raise ConfigError(
            f"a batch has the columns {list(names)}, and not {missing}; give the lines of an "
            f"OpenAI batch file in a column {LINE!r}, or as columns {list(COLUMNS)}"
        )
    if taken := [name for name in names if name in RESULT_COLUMNS and name not in wanted]:
        raise ConfigError(f"the columns {taken} are those of results; rename yours")
    values = {name: _values(batch, name) for name in wanted}
    if LINE in names:
        return [_line_text(line) for line in values[LINE]]
    rows = zip(*(values[name] for name in COLUMNS), strict=True)
    return [row_text(dict(zip(COLUMNS, row, strict=True))) for row in rows]


def with_results(batch: Any, results: Sequence[Result]) -> Any:
    """The batch with results in place of its lines, in its own form."""
    names = _names(batch)
    gone = {LINE} if LINE in names else set(COLUMNS)
    kept = [name for name in names if name not in gone]
    rows = [asdict(result) for result in results]
    made = {name: [row[name] for row in rows] for name in RESULT_COLUMNS}
    if isinstance(batch, Mapping):
        return {**{name: batch[name] for name in kept}, **made}
    arrow = importlib.import_module("pyarrow")
    table = batch.select(kept)
    for name, values in made.items():
        kind = arrow.string() if name in _OF_STRINGS else arrow.int64()
        table = table.append_column(arrow.field(name, kind), arrow.array(values, kind))
    return table


def _names(batch: Any) -> list[str]:
    if isinstance(batch, Mapping):
        return list(batch)
    if hasattr(batch, "column_names"):
        return list(batch.column_names)
    raise ConfigError(
        f"a batch is a {type(batch).__name__}; give map_batches batch_format='pyarrow' or 'numpy'"
    )


def _values(batch: Any, name: str) -> list[Any]:
    if isinstance(batch, Mapping):
        return [_plain(value) for value in batch[name]]
    values: list[Any] = batch.column(name).to_pylist()
    return values


def _plain(value: Any) -> Any:
    """Without numpy's types, which a row of Ray's holds at any depth."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _line_text(line: Any) -> bytes | None:
    if isinstance(line, str):
        line = line.encode(errors="surrogatepass")
    elif not isinstance(line, bytes):
        line = json.dumps(line, default=str).encode()
    return line if len(line) <= MAX_LINE_BYTES else None
