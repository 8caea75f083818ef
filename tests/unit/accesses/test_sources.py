"""Traces of other tools give the accesses in them, or are refused with the line's number."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.accesses import Trace, open_trace, parse_trace, read_trace, text
from softsgx.errors import SoftSgxError

Access = tuple[int, bool]


def parsed(data: bytes, file_format: str | None = None, name: str = "file") -> Trace:
    with parse_trace(io.BytesIO(data), name, file_format) as reader:
        return reader.read()


def accesses(trace: Trace) -> list[Access]:
    chunk = trace.accesses
    return list(zip(chunk.pages.tolist(), chunk.writes.tolist(), strict=True))


def refusal(data: bytes, file_format: str | None = None) -> str:
    with pytest.raises(SoftSgxError) as refused:
        parsed(data, file_format)
    message = str(refused.value)
    assert message.startswith("file: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    "data",
    [
        b"5 r\n0 w\n5\n",
        b"5,r\r\n0,W\r\n5,R",
        b"# recorded on Monday\n\n0x5\tr\n0x0\t1\n  5 0\n",
        b"page,write\n5,r\n0,w\n5,r\n",
        b"write page\n0 5\n1 0\n0 5\n",
    ],
)
def test_lines_of_text_are_pages_with_r_or_w(data: bytes) -> None:
    trace = parsed(data)
    assert accesses(trace) == [(5, False), (0, True), (5, False)]
    assert trace.info.enclaves[0].pages == 6
    assert not trace.info.timed
    assert trace.accesses.times_ns.tolist() == [0, 1, 2]


def test_addresses_become_pages_in_order_of_first_use() -> None:
    trace = parsed(b"address, write\n0x7fffffffe123 w\n0x400000 r\n0x7fffffffefff r\n4198399 r\n")
    assert accesses(trace) == [(0, True), (1, False), (0, False), (1, False)]


def test_times_of_a_text_are_kept() -> None:
    trace = parsed(b"time_ns,page\n5,1\n5,2\n90000000000,1\n")
    assert trace.info.timed
    assert trace.accesses.times_ns.tolist() == [5, 5, 90000000000]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"page,size\n1,2\n", "line 1: neither an access nor a header"),
        (b"write\nr\n", "line 1: neither an access nor a header"),
        (b"page,page\n1,2\n", "line 1: neither an access nor a header"),
        (b"1 r\n2 x\n", "line 2: no r or w"),
        (b"page\n,", "line 2: 2 fields"),
        (b"address,write\n,r\n", "line 2: not a number of 64 bits"),
        (b"1 r\n-2 r\n", "line 2: not a number of 64 bits"),
        (b"1 r\n99999999999999999999 r\n", "line 2: not a number of 64 bits"),
        (b"1 r\n4294967296 r\n", "page 4294967296: numbers of pages have 32 bits"),
        (b"1 r\n1 r 7\n", "line 2: 3 fields; the fields are page, write"),
        (b"page,write\n1\n", "line 2: 1 fields"),
        (b"1 r\n" + b"1" * 5000, "line 2: over 4096 characters"),
        (b"time_ns,page\n5,1\n4,2\n", "times decrease"),
        (b"\0\1\2", "unknown format; name it"),
    ],
)
def test_a_line_that_is_no_access_is_refused_with_its_number(data: bytes, problem: str) -> None:
    assert problem in refusal(data)


def test_an_empty_text_is_an_empty_trace() -> None:
    assert accesses(parsed(b"# nothing\n")) == []


@given(st.lists(st.tuples(st.integers(0, (1 << 32) - 1), st.booleans()), min_size=1))
def test_any_accesses_survive_as_text(given_accesses: list[Access]) -> None:
    lines = "".join(f"{page} {'rw'[write]}\n" for page, write in given_accesses)
    assert accesses(parsed(lines.encode())) == given_accesses


def test_blocks_do_not_change_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_RECORDS", 3)
    assert accesses(parsed(b"".join(b"%d\n" % page for page in range(10)))) == [
        (page, False) for page in range(10)
    ]


# --- lackey --------------------------------------------------------------------------------------

LACKEY = b"""==12== Lackey, an example Valgrind tool
==12== Command: sort, a file
==12==
I  04222540,3
 S 1ffeffeffc,8
 L 1ffeffe7e8,8
 M 04222ff8,8
==12== Counted 1 call to main()
"""


def test_lackeys_lines_are_fetches_loads_stores_and_modifications() -> None:
    trace = parsed(LACKEY)
    # The store is over the end of a page.
    assert accesses(trace) == [(0, False), (1, True), (2, True), (1, False), (0, True)]
    assert not trace.info.timed


lines = st.lists(
    st.tuples(
        st.sampled_from(["I ", " L", " S", " M"]), st.integers(0, 1 << 47), st.integers(1, 64)
    ),
    min_size=1,
    max_size=40,
)


@given(lines, st.integers(1, 40))
def test_lackeys_lines_are_read_as_one_by_one(
    given_lines: list[tuple[str, int, int]], block_bytes: int
) -> None:
    numbers: dict[int, int] = {}
    expected = [
        (numbers.setdefault(page, len(numbers)), kind in (" S", " M"))
        for kind, address, size in given_lines
        for page in range(address >> 12, (address + size - 1 >> 12) + 1)
    ]
    data = "".join(f"{kind} {address:08x},{size}\n" for kind, address, size in given_lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softsgx.accesses.lackey._BLOCK_BYTES", block_bytes + 40)
        assert accesses(parsed(data.encode(), "lackey")) == expected


@pytest.mark.parametrize(
    "line",
    [
        b"I  0422zz40,3",
        b"I  ,3",
        b"I  04222540,",
        b"I  04222540",
        b"I  04222540,3,3",
        b"I  04222540,0",
        b"I  04222540,a",
        b"I  12345678123456781,8",
        b" X 04222540,8",
        b"IL 04222540,8",
        b" L04222540,8",
        b"Hello",
        b"",
        b"a, b",
    ],
)
def test_another_line_among_lackeys_is_refused(line: bytes) -> None:
    assert "not a line of lackey" in refusal(LACKEY + line + b"\nI  04222540,3\n", "lackey")


def test_a_lackey_log_that_ends_within_a_line_is_refused() -> None:
    assert "not a line of lackey" in refusal(LACKEY + b"I  0422", "lackey")
    assert "not a line of lackey" in refusal(b"x" * (3 << 20), "lackey")


# --- oracleGeneral -------------------------------------------------------------------------------


def oracle(*rows: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<IQIq", second, thing, 1, -1) for second, thing in rows)


def test_oracle_general_objects_are_pages_timed_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "web.oracleGeneral"
    path.write_bytes(oracle((1, 1 << 60), (1, 3), (4, 1 << 60)))
    trace = read_trace(path)
    assert accesses(trace) == [(0, False), (1, False), (0, False)]
    assert trace.info.timed
    assert trace.accesses.times_ns.tolist() == [10**9, 10**9, 4 * 10**9]


def test_a_cut_oracle_general_file_is_refused() -> None:
    assert "no multiple of 24 bytes" in refusal(oracle((1, 2))[:-1], "oracleGeneral")
    assert "times decrease" in refusal(oracle((2, 2), (1, 2)), "oracleGeneral")


# --- files ---------------------------------------------------------------------------------------


def test_an_unknown_format_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    assert "unknown format 'csv'; give one of softsgx, text" in refusal(b"1\n", "csv")
    with pytest.raises(SoftSgxError, match=r"nowhere: No such file or directory"):
        open_trace(tmp_path / "nowhere")
    with pytest.raises(SoftSgxError, match=r"Is a directory"):
        open_trace(tmp_path)
