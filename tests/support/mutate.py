"""Broken versions of valid input, the same ones for the same seed."""

import json
import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 2**31, -(2**31), 2**63, 2**64, -(2**63) - 1, 10**400, 1e308,
    "", "\x00", "x" * 5000, "\ud800", "é" * 40, "../../etc/passwd", "{{ 7 * 7 }}", "<|begin|>",
    [], {}, [[]] * 3, [None], [0] * 3000, {"a": {"b": [1]}}, {"": None}, {"type": "text"},
)  # fmt: skip


def broken_bytes(draw: random.Random, samples: Sequence[bytes]) -> bytes:
    """A sample with some of its bytes changed, lost, doubled or swapped with another's; sometimes
    noise alone."""
    if draw.random() < 0.05:
        return draw.randbytes(draw.randrange(200))
    data = bytearray(draw.choice(samples))
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.randrange(1, 9)]
            case 2:
                data[at:at] = draw.randbytes(draw.randrange(1, 9))
            case 3:
                data[at:at] = data[at : at + draw.randrange(1, 40)]
            case 4:
                other = draw.choice(samples)
                begin = draw.randrange(len(other) + 1)
                data[at : at + 20] = other[begin : begin + draw.randrange(1, 40)]
            case _ if data:
                data[at % len(data)] = draw.choice((0x00, 0x7F, 0x80, 0xC0, 0xC1, 0xDB, 0xDF, 0xFF))
    return bytes(data)


def broken_json(draw: random.Random, samples: Sequence[dict[str, Any]]) -> bytes:
    """A line of JSON with strange values, names and nesting; sometimes with broken bytes too."""
    value = json.loads(json.dumps(draw.choice(samples)))
    for _ in range(draw.randrange(1, 4)):
        _disturb(draw, value)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
    if draw.random() < 0.1:
        text = b"[" * draw.randrange(1, 3000) + text
    return broken_bytes(draw, [text]) if draw.random() < 0.2 else text


def _disturb(draw: random.Random, value: Any) -> None:
    """Changes one thing somewhere inside."""
    while True:
        places: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places:
            return
        place = draw.choice(places)
        inner = value[place]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.3:
            break
        value = inner
    if isinstance(value, dict) and draw.random() < 0.3:
        name = draw.choice((str(place) + "x", "", "custom_id", "n", "x" * 300))
        value[name] = deepcopy(draw.choice(_STRANGE))
    elif isinstance(value, dict) and draw.random() < 0.2:
        del value[place]
    else:
        value[place] = deepcopy(draw.choice(_STRANGE))
