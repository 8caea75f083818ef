"""Sizes: every notation that people use, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.sizes import MOST_BYTES, parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4096B", 4096),
        ("512 bytes", 512),
        ("64KiB", 65536),
        ("93.5MiB", 0x5D80000),
        ("1 GiB", 1 << 30),
        ("512Ki", 1 << 19),
        ("10Mi", 10 << 20),
        ("2Ti", 2 << 40),
        ("12M", 12_000_000),
        ("12MB", 12_000_000),
        ("5k", 5000),
        ("5kB", 5000),
        ("0x10000", 65536),
        ("0XfF", 255),
        ("0", 0),
        (str(MOST_BYTES), MOST_BYTES),
        ("0.1MiB", 104857),
        (" 1MiB ", 1 << 20),
    ],
)
def test_a_size_is_read_in_the_notation_of_its_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "much",
        "-1",
        "-1MiB",
        "1e3",
        "1.5.2MiB",
        "MiB",
        "1mib",
        "1m",
        "1K",
        "0x",
        "0x1.8",
        "1_000",
        "٤٠٩٦",
        "1MiB1",
        ".5MiB",
        "1.MiB",
        "+1",
        "nan",
        "1 0",
        str(MOST_BYTES + 1),
        "17179869184Gi",
    ],
)
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a size; write|out of range; give 0 to"):
        parse_size(text)


@given(st.integers(0, MOST_BYTES // 2))
def test_a_size_that_is_shown_can_be_given_back(size: int) -> None:
    """Within the one decimal that is shown."""
    assert parse_size(size_text(size).replace(" ", "")) == pytest.approx(size, rel=0.05, abs=0.5)
