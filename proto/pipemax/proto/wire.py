"""Messages to bytes and back. Anything that is not exactly a known message is a WireError that
says what was wrong, in words its sender can act on."""

from collections.abc import Sequence
from typing import Final, Union

import msgpack
import msgspec

from pipemax.proto.errors import WireError
from pipemax.proto.messages.registry import Channel
from pipemax.proto.messages.types import Message

_ENCODER: Final = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _ENCODER.encode(message)


class Codec:
    """Decodes what may arrive on one end of a channel."""

    def __init__(self, channel: Channel, *, at_binder: bool) -> None:
        accepted = channel.to_binder if at_binder else channel.to_peer
        self._channel = channel
        self._tags = tuple(str(message.__struct_config__.tag) for message in accepted)
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(
            Union[accepted]  # noqa: UP007  (built from a tuple)
        )

    def decode(self, frame: bytes | memoryview) -> Message:
        """Raises WireError with code `too_large`, `not_msgpack`, `not_a_map`, `unknown_type` or
        `invalid_field`."""
        size = len(frame)
        if size > self._channel.max_message_bytes:
            raise WireError(
                "too_large",
                f"message of {size} bytes; {self._channel.name} takes at "
                f"most {self._channel.max_message_bytes}",
            )
        try:
            return self._decoder.decode(frame)
        except msgspec.DecodeError as error:
            raise self._explain(frame, error) from error

    def _explain(self, frame: bytes | memoryview, error: Exception) -> WireError:
        """Reads the message without a schema to say more than where decoding stopped."""
        try:
            found = msgpack.unpackb(frame, raw=False, strict_map_key=False)
        except Exception:
            return WireError("not_msgpack", "not one complete MessagePack object")
        if not isinstance(found, dict):
            return WireError("not_a_map", f"a message is a map, not a {type(found).__name__}")
        tag = found.get("type")
        if tag not in self._tags:
            known = ", ".join(self._tags)
            name = self._channel.name
            return WireError("unknown_type", f"type {tag!r:.80} is not accepted on {name}: {known}")
        return WireError("invalid_field", f"{tag}: {error}")


def single_frame(frames: Sequence[bytes], channel: Channel) -> bytes:
    """The payload of a message that must be one frame; raises WireError otherwise."""
    if len(frames) != 1:
        raise WireError("frames", f"a message on {channel.name} is one frame, not {len(frames)}")
    return frames[0]
