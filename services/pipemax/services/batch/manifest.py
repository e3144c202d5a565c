"""What an output was made from, in a file beside it, so that a second run knows if it may go on.

`<output>.manifest.json` holds the fingerprint of each input, the settings that results depend on,
and whether the batch came to its end.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.services.batch.inputs import Fingerprint
from pipemax.services.batch.outputs import STDOUT, working_file

Setting = str | int | float | None
_VERSION = 1


class InputEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: str
    lines: int
    """That are not blank."""
    size_bytes: int
    blake2b: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    inputs: tuple[InputEntry, ...]
    settings: dict[str, Setting]
    """That results depend on."""
    complete: bool = False
    """Every line has its result."""

    def difference(self, other: "Manifest") -> str | None:
        """The first thing in which `other` was made from something else, in words. Where the files
        lie does not matter."""
        if len(self.inputs) != len(other.inputs):
            return f"it was made from {len(other.inputs)} input files, not {len(self.inputs)}"
        for mine, theirs in zip(self.inputs, other.inputs, strict=True):
            if mine.blake2b != theirs.blake2b:
                return f"{theirs.path} was another file then ({theirs.lines} lines)"
        for name in sorted({*self.settings, *other.settings}):
            now, then = self.settings.get(name), other.settings.get(name)
            if now != then:
                return f"{name} was {then!r} and is {now!r}"
        return None


def settings_of(config: EngineConfig) -> dict[str, Setting]:
    """Of a system, as far as results depend on them."""
    return {
        "model": config.model,
        "served_model_name": config.served_model_name,
        "load_format": config.load_format,
        "dtype": config.dtype,
        "seed": config.seed,
    }


def describe(inputs: Mapping[Path, Fingerprint], settings: Mapping[str, Setting]) -> Manifest:
    """Of a batch that is to begin."""
    return Manifest(
        inputs=tuple(
            InputEntry(path=str(path), lines=f.lines, size_bytes=f.size_bytes, blake2b=f.blake2b)
            for path, f in inputs.items()
        ),
        settings=dict(settings),
    )


def manifest_path(output: Path) -> Path:
    return output.with_name(output.name + ".manifest.json")


def can_have_one(output: Path) -> bool:
    """Pipes and devices keep nothing that a second run could go on from."""
    return output != STDOUT and (output.is_file() or not output.exists())


def save(manifest: Manifest, output: Path) -> None:
    """As a whole or not at all. Raises ConfigError when it cannot be written."""
    path = manifest_path(output)
    made = path.with_name(path.name + ".new")
    try:
        with made.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; make room") from error


def load(output: Path) -> Manifest | None:
    """None when there is none. Raises ConfigError for one that is damaged or of another version."""
    path = manifest_path(output)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); remove it and give --resume to go on by custom_id, "
            "or --overwrite to start over"
        ) from error


Start = Literal["new", "continue", "nothing to do"]


def how_to_start(
    output: Path, manifest: Manifest | None, *, resume: bool, overwrite: bool, retry_errors: bool
) -> Start:
    """What a run may do with the output that is there. `manifest` describes the batch that is
    asked for; None where its input cannot be known beforehand.

    Raises ConfigError when results of another batch would be mixed in or lost.
    """
    there = any(p.exists() and p.stat().st_size for p in {output, working_file(output)})
    if overwrite or not there or not can_have_one(output):
        return "new"
    before = load(output)
    why = "it has no manifest beside it" if before is None else None
    if before is not None:
        why = "the input is a pipe" if manifest is None else manifest.difference(before)
    if why is not None and not resume:
        raise ConfigError(
            f"{output} holds results, and this batch may not be theirs: {why}; give another "
            "output, --overwrite to start over, or --resume to go on by custom_id all the same"
        )
    if why is None and before is not None and before.complete and not retry_errors:
        return "nothing to do"
    return "continue"
