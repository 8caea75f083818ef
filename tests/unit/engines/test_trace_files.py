"""A file of page accesses is read whole or refused in one line, and cannot unpack without end."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from softsgx.engines.replay import PageTrace, read_trace, trace, write_trace
from softsgx.errors import SoftSgxError

ACCESSES = [(3, True), (0, False), (7, True)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace", PageTrace.of(ACCESSES))
    assert list(read_trace(tmp_path / "trace")) == ACCESSES


def test_more_accesses_than_a_trace_may_have_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace"
    monkeypatch.setattr(trace, "MOST_ACCESSES", 3)
    write_trace(path, PageTrace.of(ACCESSES))
    assert len(read_trace(path)) == 3
    write_trace(path, PageTrace.of([*ACCESSES, (1, False)]))
    with pytest.raises(SoftSgxError, match="more than 3 accesses"):
        read_trace(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x1f\x8b",
        gzip.compress(b"12345", mtime=0),
        gzip.compress(struct.pack("<I", 1), mtime=0)[:-3],
    ],
    ids=["nothing but a magic number", "no whole words", "cut off"],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(data)
    with pytest.raises(SoftSgxError) as refused:
        read_trace(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert len(str(refused.value).splitlines()) == 1
