from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.errors import ConfigError
from pipemax.proto.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("17b", 17),
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        ("  4GiB ", 4 * 2**30),
        ("4GB", 4 * 10**9),
        ("1.5GB", 1_500_000_000),
        ("0.5KiB", 512),
        ("2TiB", 2 * 2**40),
    ],
)
def test_parse(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-1",
        "1e9",
        "4 Gb s",
        "4GiB/s",
        "1.GiB",
        ".5GiB",
        "0x10",
        "4QiB",
        "inf",
        "9" * 400,
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write for example 64MiB"):
        parse_size(text)


@given(st.text())
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (64 * 2**20, "64.0 MiB"),
        (3 * 2**39, "1.5 TiB"),
    ],
)
def test_format(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(0, 2**50))
def test_format_is_within_its_rounding(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.05)
