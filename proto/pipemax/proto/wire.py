"""Messages to bytes and back. Anything that is not exactly a known message is a WireError that
says what was wrong, in words its sender can act on."""

import sys
from collections.abc import Sequence
from typing import Final, Union

import msgpack
import msgspec

from pipemax.proto.errors import WireError
from pipemax.proto.messages.registry import Channel
from pipemax.proto.messages.types import Message
from pipemax.proto.objects import count_objects

_ENCODER: Final = msgspec.msgpack.Encoder()
_MAX_TAG_BYTES: Final = 64
_COUNTED_BYTES: Final = 2**20
"""Smaller messages are no burden, whatever they are made of."""
_MAX_DETAIL_CHARS: Final = 300
"""Of what a decoder says: it may quote the message, and its sender need not get it all back."""


def encode(message: Message) -> bytes:
    return _ENCODER.encode(message)


class Codec:
    """Decodes what may arrive on one end of a channel."""

    def __init__(self, channel: Channel, *, at_binder: bool) -> None:
        accepted = channel.to_binder if at_binder else channel.to_peer
        self._channel = channel
        self._max_objects = channel.max_objects_to_binder if at_binder else sys.maxsize
        self._tags = tuple(str(message.__struct_config__.tag) for message in accepted)
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(
            Union[accepted]  # noqa: UP007  (built from a tuple)
        )

    def decode(self, frame: bytes | memoryview) -> Message:
        """Raises WireError with code `too_large`, `too_many_objects`, `not_msgpack`, `not_a_map`,
        `unknown_type` or `invalid_field`, and nothing else, whatever the bytes."""
        size = len(frame)
        if size > self._channel.max_message_bytes:
            raise WireError(
                "too_large",
                f"message of {size} bytes; {self._channel.name} takes at "
                f"most {self._channel.max_message_bytes}",
            )
        if size > _COUNTED_BYTES and count_objects(frame, self._max_objects) > self._max_objects:
            raise WireError(
                "too_many_objects",
                f"message of more than {self._max_objects} lists, maps and texts; send it in parts",
            )
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._explain(frame, error) from error

    def _explain(self, frame: bytes | memoryview, error: Exception) -> WireError:
        """Reads the message's outline without a schema to say more than where decoding stopped."""
        try:
            is_map, tag = _outline(frame)
        except Exception:
            return WireError("not_msgpack", "not one complete MessagePack object")
        if not is_map:
            return WireError("not_a_map", "a message is a map with the key 'type'")
        if tag not in self._tags:
            known = ", ".join(self._tags)
            name = self._channel.name
            return WireError("unknown_type", f"type {tag!r:.80} is not accepted on {name}: {known}")
        return WireError("invalid_field", f"{tag}: {error}"[:_MAX_DETAIL_CHARS])


def _outline(frame: bytes | memoryview) -> tuple[bool, object]:
    """Whether `frame` is a map, and its value under `type` if that is text. Values are skipped, not
    built: sixteen million empty lists are 16 MiB as bytes and a gigabyte as objects. Raises when
    the frame is not exactly one MessagePack object."""
    reader = _reader(frame)
    reader.skip()
    if reader.tell() != len(frame):
        raise ValueError("bytes after the message")
    reader = _reader(frame)
    try:
        num_keys = reader.read_map_header()
    except ValueError:
        return False, None
    tag: object = None
    for _ in range(num_keys):
        key = _short_item(reader, frame)
        value = _short_item(reader, frame)
        if key == "type":
            tag = value
    return True, tag


def _reader(frame: bytes | memoryview) -> msgpack.Unpacker:
    reader = msgpack.Unpacker(max_buffer_size=max(len(frame), 1))
    reader.feed(frame)
    return reader


def _short_item(reader: msgpack.Unpacker, frame: bytes | memoryview) -> object:
    """The next object when it is a few bytes long (as every tag is), else None."""
    start = reader.tell()
    reader.skip()
    end = reader.tell()
    if end - start > _MAX_TAG_BYTES:
        return None
    try:
        return msgpack.unpackb(frame[start:end], strict_map_key=False)
    except (ValueError, TypeError):  # text that is not UTF-8, a map with a list as its key
        return None


def single_frame(frames: Sequence[bytes], channel: Channel) -> bytes:
    """The payload of a message that must be one frame; raises WireError otherwise."""
    if len(frames) != 1:
        raise WireError("frames", f"a message on {channel.name} is one frame, not {len(frames)}")
    return frames[0]
