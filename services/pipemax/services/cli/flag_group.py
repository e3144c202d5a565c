"""Flags that several commands share, as a dataclass whose fields are annotated for Typer."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints


def takes(group: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a Typer command the flags of the dataclass `group`. The command takes a `group` as its
    first parameter; its other parameters are its own flags and come first in its help."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        first, *own = inspect.signature(command).parameters.values()
        if first.annotation is not group:
            raise TypeError(f"{command.__name__}: the first parameter takes {group.__name__}")
        hints = get_type_hints(group, include_extras=True)
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields(group)
        ]

        @functools.wraps(command)
        def with_flags(**values: Any) -> None:
            given = group(**{field.name: values.pop(field.name) for field in shared})
            command(given, **values)

        keyword_only = [part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in own]
        signature = inspect.Signature([*keyword_only, *shared])
        with_flags.__signature__ = signature  # type: ignore[attr-defined]
        with_flags.__annotations__ = {
            part.name: part.annotation for part in signature.parameters.values()
        }
        return with_flags

    return give
