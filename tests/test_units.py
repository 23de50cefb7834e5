"""Sizes, durations and rates as text: what is read, and that every refusal says what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.types import GIB, KIB, MIB
from kvstore.units import Quota, format_size, parse_duration, parse_rate, parse_size

Parser = Callable[[object], object]

# fmt: off
READ: dict[Parser, dict[Any, Any]] = {
    parse_size: {
        "64 GiB": 64 * GIB, "512MiB": 512 * MIB, "0": 0, 0: 0, 4096: 4096, "4096": 4096,
        "4096 B": 4096, "1.5 TiB": 1536 * GIB, "0.5 KiB": 512, "1 kB": 1000, "500 GB": 500 * 10**9,
        "2 PiB": 2 << 50, " 3 gib ": 3 * GIB, (1 << 63) - 1: (1 << 63) - 1,
    },
    parse_duration: {
        "10 min": 600.0, "1 s": 1.0, "250 ms": 0.25, "2 h": 7200.0, "1 d": 86_400.0, 0.5: 0.5,
        3: 3.0, "7": 7.0, "1.5h": 5400.0, 0: 0.0,
    },
    parse_rate: {
        "unlimited": None, "Unlimited": None, "2 TiB/day": (2 << 40) / 86_400, "86400 B/d": 1.0,
        "500 MB/s": 5e8, "1 GiB / h": GIB / 3600, "60 KiB/min": float(KIB),
    },
}
REFUSED: dict[Parser, list[Any]] = {
    parse_size: [
        "", "GiB", "64 G", "64 XB", "1e9", "0.3 B", "-1", "-1 GiB", -1, 1.5, True, None, [],
        "1 B x", 1 << 63, "9" * 31, "8192 PiB", float("nan"), float("inf"), "\u0663 GiB", "1. GiB",
    ],
    parse_duration: [
        "", "soon", "1 week", "-1 s", -1, "11000 d", 1e300, float("inf"), float("nan"), True,
    ],
    parse_rate: ["2 TiB", "x/day", "2 TiB/", "/s", 7, None, "2 TiB/year"],
}
# fmt: on


@pytest.mark.parametrize("parser", READ)
def test_values_are_read(parser: Parser) -> None:
    for text, value in READ[parser].items():
        assert parser(text) == value, text
        assert type(parser(text)) is type(value), text


@pytest.mark.parametrize("parser", REFUSED)
def test_what_is_no_value_is_refused_with_the_remedy(parser: Parser) -> None:
    for text in REFUSED[parser]:
        with pytest.raises(ValueError, match=r"is not .*: write it like"):
            parser(text)


@given(st.integers(0, (1 << 63) - 1))
def test_sizes_come_back_from_their_text(count: int) -> None:
    assert parse_size(format_size(count)) == count


@given(st.integers(0, 4095), st.sampled_from(["KiB", "MiB", "GiB", "TiB", "kB", "MB", "TB", "B"]))
def test_sizes_with_a_unit_come_back_exactly(number: int, unit: str) -> None:
    count = parse_size(f"{number} {unit}")
    assert count == parse_size(f"{number}{unit.upper()}") == parse_size(f"{number}.0 {unit}")
    assert parse_size(format_size(count)) == count


@given(st.one_of(st.text(max_size=20), st.floats(), st.integers(), st.booleans(), st.none()))
def test_no_value_breaks_a_parser(value: object) -> None:
    for parser in (parse_size, parse_duration, parse_rate, Quota.parse):
        try:
            parser(value)
        except ValueError as error:
            assert ": " in str(error)
