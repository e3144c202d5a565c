import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.errors import WireError
from pipemax.proto.messages.registry import INGEST
from pipemax.proto.objects import count_objects
from pipemax.proto.wire import Codec

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=300)
    | st.binary(max_size=70_000),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=60,
)


def objects_in(value: object) -> int:
    if isinstance(value, list):
        return 1 + sum(map(objects_in, value))
    if isinstance(value, dict):
        return 1 + sum(map(objects_in, value)) + sum(map(objects_in, value.values()))
    return isinstance(value, str | bytes)


@given(VALUES)
def test_it_counts_what_decoding_would_make(value: object) -> None:
    frame = msgpack.packb(value)
    assert count_objects(frame, 10**9) == objects_in(value)
    assert count_objects(memoryview(frame), 10**9) == objects_in(value)


def test_large_headers_and_extensions() -> None:
    value = [["x"] * 70_000, {str(n): n for n in range(66_000)}, "y" * 70_000, b"z" * 70_000]
    assert count_objects(msgpack.packb(value), 10**9) == objects_in(value)
    extensions = [msgpack.ExtType(1, bytes(size)) for size in (1, 2, 4, 8, 16, 3, 300, 70_000)]
    assert count_objects(msgpack.packb(extensions), 10**9) == 1 + len(extensions)


@given(st.binary(max_size=300))
def test_noise_ends_it(noise: bytes) -> None:
    assert 0 <= count_objects(noise, 10**9) <= len(noise)


def test_a_message_of_empty_lists_is_refused_before_it_is_made() -> None:
    messages = [{"role": "user", "content": "a", "more": [[]] * 2**21}]
    frame = msgpack.packb({"type": "submit", "request_id": "a", "messages": messages})
    with pytest.raises(WireError) as refused:
        Codec(INGEST, at_binder=True).decode(frame)
    assert refused.value.code == "too_many_objects"
    long = [{"role": "user", "content": "a" * 2**21}]
    frame = msgpack.packb({"type": "submit", "request_id": "a", "messages": long})
    Codec(INGEST, at_binder=True).decode(frame)
