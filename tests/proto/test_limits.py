"""Every field of what clients may say has a limit, in the schema or beyond it."""

from collections.abc import Iterator

import msgspec.inspect as inspect

from pipemax.proto.messages.registry import INGEST

THE_CLIENTS_OWN = {
    "Submit.messages.*",  # goes through the chat template, in its sandbox and limits
    "ChatOptions.chat_template_kwargs.*",  # the same
    "StructuredOutputs.json.*",  # MAX_GRAMMAR_CHARS, once it is a grammar
}
"""Values of any kind: bounded by the size of the message alone."""


def unlimited(kind: inspect.Type, place: str, seen: set[type]) -> Iterator[str]:
    """Fields at `place` and below that a message could fill without end, but for its size."""
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            if cls not in seen:
                seen.add(cls)
                for field in fields:
                    yield from unlimited(field.type, f"{cls.__name__}.{field.name}", seen)
        case inspect.UnionType(types=types):
            for one in types:
                yield from unlimited(one, place, seen)
        case inspect.StrType() | inspect.BytesType():
            if kind.max_length is None and not getattr(kind, "pattern", None):
                yield place
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            if kind.max_length is None:
                yield place
            yield from unlimited(item, place, seen)
        case inspect.DictType(key_type=key, value_type=value):
            if kind.max_length is None:
                yield place
            yield from unlimited(key, f"{place}.keys", seen)
            yield from unlimited(value, f"{place}.*", seen)
        case inspect.IntType() | inspect.FloatType():
            low = kind.ge if kind.ge is not None else kind.gt
            high = kind.le if kind.le is not None else kind.lt
            if low is None or (high is None and isinstance(kind, inspect.IntType)):
                yield place
        case inspect.BoolType() | inspect.NoneType() | inspect.LiteralType():
            pass
        case _:
            yield place


def test_every_field_of_what_clients_say_has_a_limit() -> None:
    seen: set[type] = set()
    found = {
        place
        for message in INGEST.to_binder
        for place in unlimited(inspect.type_info(message), "", seen)
    }
    assert found == THE_CLIENTS_OWN
