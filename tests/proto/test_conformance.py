"""Every message, as a peer in another language sees it, and everything that must be refused."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.errors import WireError
from pipemax.proto.messages import document
from pipemax.proto.messages.control import Hello, StepPlan
from pipemax.proto.messages.ingest import Cancel, SamplingParams, Submit
from pipemax.proto.messages.registry import (
    CHANNELS,
    CONTROL,
    INGEST,
    KV,
    REGISTRY,
    Channel,
)
from pipemax.proto.messages.types import Message, pack_i32, unpack_i32
from pipemax.proto.wire import Codec, encode, single_frame
from support.messages import EXAMPLES


def _tag(message: Message) -> str:
    return str(type(message).__struct_config__.tag)


every_message = pytest.mark.parametrize("message", EXAMPLES, ids=_tag)


def _codec_for(message: Message) -> Codec:
    """The decoder of the end that receives `message`."""
    for channel in CHANNELS:
        if type(message) in channel.to_binder:
            return Codec(channel, at_binder=True)
        if type(message) in channel.to_peer:
            return Codec(channel, at_binder=False)
    raise AssertionError(f"{message} is on no channel")


def _all_codecs() -> list[Codec]:
    return [Codec(channel, at_binder=end) for channel in CHANNELS for end in (True, False)]


def _plain(message: Message) -> dict[str, Any]:
    """`message` as the plain msgpack package decodes it."""
    decoded = msgpack.unpackb(encode(message), strict_map_key=False)  # logit_bias: by token id
    assert isinstance(decoded, dict)
    return decoded


def _subclasses(base: type[Message]) -> Iterator[type[Message]]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def test_registry_holds_every_message_and_examples_cover_it() -> None:
    defined = {cls for cls in _subclasses(Message) if cls.__module__.startswith("pipemax.")}
    assert set(REGISTRY.values()) == defined
    assert sorted(map(_tag, EXAMPLES)) == sorted(REGISTRY)


def test_tags_name_one_message_and_one_direction() -> None:
    entries = [
        message for channel in CHANNELS for message in (*channel.to_binder, *channel.to_peer)
    ]
    assert len(entries) == len(REGISTRY)


def test_readme_is_generated() -> None:
    page = Path(__file__).parents[2] / "proto" / "README.md"
    assert page.read_text() == document.render(), (
        "run `python -m pipemax.proto.messages.document > proto/README.md`"
    )


@every_message
def test_examples_leave_no_field_at_its_default(message: Message) -> None:
    """Otherwise the tests below would not see that field."""
    for field in msgspec.structs.fields(message):
        if field.default is not msgspec.NODEFAULT:
            assert getattr(message, field.name) != field.default, field.name


@every_message
def test_plain_msgpack_reads_it(message: Message) -> None:
    plain = _plain(message)
    assert plain.pop("type") == _tag(message)
    assert tuple(plain) == type(message).__struct_fields__


@every_message
def test_comes_back_equal(message: Message) -> None:
    assert _codec_for(message).decode(encode(message)) == message


@every_message
def test_plain_msgpack_writes_it(message: Message) -> None:
    """Whatever order a peer writes the keys in."""
    items = list(_plain(message).items())
    packed = msgpack.packb(dict(reversed(items)))
    assert _codec_for(message).decode(packed) == message


@every_message
def test_only_its_receiver_accepts_it(message: Message) -> None:
    accepting = 0
    for codec in _all_codecs():
        try:
            accepting += codec.decode(encode(message)) == message
        except WireError as error:
            assert error.code == "unknown_type"
    assert accepting == 1


@every_message
def test_refuses_every_truncation(message: Message) -> None:
    frame = encode(message)
    codec = _codec_for(message)
    for length in range(len(frame)):
        with pytest.raises(WireError) as caught:
            codec.decode(frame[:length])
        assert caught.value.code == "not_msgpack", length


@every_message
def test_refuses_bytes_after_the_message(message: Message) -> None:
    with pytest.raises(WireError) as caught:
        _codec_for(message).decode(encode(message) + b"\x00")
    assert caught.value.code == "not_msgpack"


@every_message
def test_refuses_a_wrong_type_in_every_field(message: Message) -> None:
    codec = _codec_for(message)
    for field in msgspec.structs.fields(message):
        # `true` is neither a number, nor text, nor a container: wrong for all fields but booleans.
        wrong = "yes" if field.type is bool else True
        with pytest.raises(WireError) as caught:
            codec.decode(msgpack.packb(_plain(message) | {field.name: wrong}))
        assert caught.value.code == "invalid_field"
        assert field.name in str(caught.value)


@every_message
def test_refuses_an_unknown_field(message: Message) -> None:
    with pytest.raises(WireError) as caught:
        _codec_for(message).decode(msgpack.packb(_plain(message) | {"surprise": 1}))
    assert caught.value.code == "invalid_field"
    assert "surprise" in str(caught.value)


@every_message
def test_a_missing_field_is_its_default_or_refused(message: Message) -> None:
    codec = _codec_for(message)
    for field in msgspec.structs.fields(message):
        plain = _plain(message)
        del plain[field.name]
        if field.required:
            with pytest.raises(WireError) as caught:
                codec.decode(msgpack.packb(plain))
            assert caught.value.code == "invalid_field"
        else:
            decoded = codec.decode(msgpack.packb(plain))
            assert getattr(decoded, field.name) != getattr(message, field.name)


def test_refuses_unknown_fields_inside_messages() -> None:
    submit = msgpack.packb(
        {"type": "submit", "request_id": "a", "prompt": "x", "sampling": {"best_of": 2}}
    )
    with pytest.raises(WireError, match="best_of"):
        Codec(INGEST, at_binder=True).decode(submit)
    plan = next(example for example in EXAMPLES if isinstance(example, StepPlan))
    plain = _plain(plan)
    plain["sample"][0].append(1)
    with pytest.raises(WireError):
        Codec(CONTROL, at_binder=False).decode(msgpack.packb(plain))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("min_tokens", -1),
        ("stop", [""]),
        ("stop", "text"),
        ("stop_token_ids", [-1]),
    ],
)
def test_refuses_sampling_values_out_of_range(field: str, value: object) -> None:
    frame = msgpack.packb({"type": "submit", "request_id": "a", "sampling": {field: value}})
    with pytest.raises(WireError, match=field) as caught:
        Codec(INGEST, at_binder=True).decode(frame)
    assert caught.value.code == "invalid_field"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", "not_msgpack"),
        (b"\xc1", "not_msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not_msgpack"),  # a list of 2**32 - 1 elements, none there
        (b"\x90", "not_a_map"),
        (b"\xc0", "not_a_map"),
        (b"\x2a", "not_a_map"),
        (b"\x80", "unknown_type"),
        (b"\x81\x01\x02", "unknown_type"),
        (b"\x81\x91\x01\x02", "unknown_type"),  # a list as key
        (b"\x81\xa4type\xa1\xff", "unknown_type"),  # not UTF-8
        (b"\x81\xa4type\xa4stop", "unknown_type"),  # known, but not here
        (b"\x81\xa4type\x91\x01", "unknown_type"),
        (b"\x82\xa4type\xa6cancel\xaarequest_id\xa2\xff\xfe", "invalid_field"),  # not UTF-8
    ],
)
def test_refuses_what_is_not_a_message(frame: bytes, code: str) -> None:
    with pytest.raises(WireError) as caught:
        Codec(INGEST, at_binder=True).decode(frame)
    assert caught.value.code == code


def _chat_holding(value: bytes) -> bytes:
    """A Submit whose chat holds the MessagePack object `value`."""
    head = msgpack.packb({"type": "submit", "request_id": "a", "messages": [{"a": None}]})
    return bytes(head[:-1]) + value


def test_refuses_nesting_without_bound() -> None:
    assert Codec(INGEST, at_binder=True).decode(_chat_holding(b"\x91\xc0"))
    with pytest.raises(WireError):
        Codec(INGEST, at_binder=True).decode(_chat_holding(b"\x91" * 100_000 + b"\xc0"))


def test_size_limit_is_exact() -> None:
    size = len(encode(Cancel(request_id="abc")))
    at_limit = dataclasses.replace(INGEST, max_message_bytes=size)
    below = dataclasses.replace(INGEST, max_message_bytes=size - 1)
    assert Codec(at_limit, at_binder=True).decode(encode(Cancel(request_id="abc")))
    with pytest.raises(WireError, match=f"{size} bytes") as caught:
        Codec(below, at_binder=True).decode(encode(Cancel(request_id="abc")))
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("channel", CHANNELS, ids=lambda channel: channel.name)
def test_every_channel_has_its_limit(channel: Channel) -> None:
    if channel.max_message_bytes <= 64 * 2**20:
        with pytest.raises(WireError) as caught:
            Codec(channel, at_binder=True).decode(bytes(channel.max_message_bytes + 1))
        assert caught.value.code == "too_large"
    assert 2**10 <= channel.max_message_bytes <= 2**30


def test_errors_are_short_whatever_the_message() -> None:
    """The text goes back to the sender and into logs."""
    codec = Codec(INGEST, at_binder=True)
    long = "x" * 1_000_000
    for plain in (
        {"type": "cancel", long: 1},
        {"type": long},
        {"type": "submit", "request_id": long},
        {"type": "submit", "request_id": "a", "sampling": {long: 1}},
    ):
        with pytest.raises(WireError) as caught:
            codec.decode(msgpack.packb(plain))
        assert len(str(caught.value)) < 1000


def test_a_message_is_one_frame() -> None:
    assert single_frame([b"x"], INGEST) == b"x"
    for frames in ([], [b"x", b"y"]):
        with pytest.raises(WireError) as caught:
            single_frame(frames, INGEST)
        assert caught.value.code == "frames"


def test_accepts_views_of_a_buffer() -> None:
    message = Cancel(request_id="a")
    assert Codec(INGEST, at_binder=True).decode(memoryview(encode(message))) == message


_packable: st.SearchStrategy[object] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def _decodes_or_refuses(codec: Codec, frame: bytes) -> None:
    try:
        message = codec.decode(frame)
    except WireError as error:
        assert error.code in {"not_msgpack", "not_a_map", "unknown_type", "invalid_field"}
    else:
        # As bytes: a NaN is not equal to itself.
        assert encode(codec.decode(encode(message))) == encode(message)


@given(st.binary(max_size=200))
def test_random_bytes(frame: bytes) -> None:
    for codec in _all_codecs():
        with pytest.raises(WireError):
            codec.decode(frame)


@given(st.sampled_from(EXAMPLES), st.data())
def test_random_values_in_a_known_message(message: Message, data: st.DataObject) -> None:
    plain = _plain(message)
    key = data.draw(st.sampled_from(sorted(plain)))
    plain[key] = data.draw(_packable)
    _decodes_or_refuses(_codec_for(message), msgpack.packb(plain))


@given(st.sampled_from(EXAMPLES), st.data())
def test_flipped_bytes(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    _decodes_or_refuses(_codec_for(message), bytes(frame))


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_i32_columns_are_little_endian(values: list[int]) -> None:
    packed = pack_i32(values)
    assert packed == b"".join(value.to_bytes(4, "little", signed=True) for value in values)
    assert list(unpack_i32(packed)) == values


def test_i32_column_of_odd_length_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        unpack_i32(b"\x00\x00\x00")


def test_i32_refuses_what_does_not_fit() -> None:
    with pytest.raises(OverflowError):
        pack_i32([2**31])


def test_identities_and_roles_have_bounds() -> None:
    hello = {"type": "hello", "protocol": 1, "role": "stage", "pid": 1, "incarnation": "x"}
    codec = Codec(CONTROL, at_binder=True)
    assert codec.decode(msgpack.packb(hello)) == Hello(
        protocol=1, role="stage", pid=1, incarnation="x"
    )
    for change in ({"role": "client"}, {"index": 1024}, {"index": -1}, {"incarnation": "x" * 257}):
        with pytest.raises(WireError) as caught:
            codec.decode(msgpack.packb(hello | change))
        assert caught.value.code == "invalid_field"


def test_kv_channel_fits_its_largest_message() -> None:
    attach = next(example for example in EXAMPLES if _tag(example) == "attach_pool")
    assert len(encode(attach)) * 100 < KV.max_message_bytes


def test_defaults_of_submit_are_what_the_page_says() -> None:
    frame = msgpack.packb({"type": "submit", "request_id": "a", "prompt": "x"})
    decoded = Codec(INGEST, at_binder=True).decode(frame)
    assert decoded == Submit(request_id="a", prompt="x", sampling=SamplingParams())
    assert SamplingParams().max_tokens == 16
