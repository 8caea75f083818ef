"""SGXS: a canonical stream's digest is its MRENCLAVE; everything else is refused by name."""

from __future__ import annotations

import hashlib
import struct

import pytest
from tests.support.enclave_files import PAGE, blob_plan, code, sgxs_file

from softsgx.errors import SoftSgxError
from softsgx.image import Blob, Bytes, Data, Fill, Plan, Run, measure, read_sgxs, write_sgxs


def ecreate(size: int = 0x4000, tag: bytes = b"ECREATE\0") -> bytes:
    return struct.pack("<8sIQ44x", tag, 1, size)


def eadd(offset: int = 0, flags: int = 0x203) -> bytes:
    return struct.pack("<8sQQ40x", b"EADD", offset, flags)


def chunk(offset: int, data: bytes = b"", tag: bytes = b"EEXTEND\0") -> bytes:
    return struct.pack("<8sQ48x", tag, offset) + data.ljust(256, b"\0")


def unmeasured(offset: int, data: bytes) -> bytes:
    return chunk(offset, data, b"UNMEASRD")


def read(*records: bytes) -> Plan:
    return read_sgxs(Bytes("x.sgxs", b"".join(records))).plan


def test_a_plain_streams_digest_is_its_mrenclave() -> None:
    stream = sgxs_file()
    assert measure(read(stream)) == hashlib.sha256(stream).digest() == measure(blob_plan())


def test_a_plan_comes_back_from_its_stream() -> None:
    plan = read(sgxs_file())
    again = b"".join(write_sgxs(plan))
    assert again == sgxs_file()
    assert plan.tcs == blob_plan().tcs
    for one, other in zip(plan.pages(), blob_plan().pages(), strict=True):
        assert (one.offset, one.flags, one.mask) == (other.offset, other.flags, other.mask)
        assert bytes(one.data) == bytes(other.data)


def test_unmeasured_data_is_loaded_and_not_hashed() -> None:
    with_data = [ecreate(), eadd(), chunk(0, b"m"), unmeasured(0x300, b"u")]
    plan = read(*with_data)
    (page,) = plan.pages()
    assert page.mask == 1
    assert bytes(page.data[0x300:0x301]) == b"u"
    assert measure(plan) == hashlib.sha256(b"".join(with_data[:3])).digest()


def test_missing_chunks_are_zero_and_unmeasured() -> None:
    (page,) = read(ecreate(), eadd(0x1000), chunk(0x1200, b"\7" * 256)).pages()
    assert page.mask == 1 << 2
    assert bytes(page.data) == bytes(0x200) + b"\7" * 256 + bytes(PAGE - 0x300)


def test_equal_pages_in_a_row_are_one_run() -> None:
    heap = [eadd(i * PAGE) for i in range(1, 4)]
    plan = read(ecreate(), eadd(0, 0x205), *heap)
    assert [(run.pages, run.source) for run in plan.runs] == [(1, Fill(0)), (3, Fill(0))]


@pytest.mark.parametrize(
    ("records", "offset", "why"),
    [
        ([], "0x0", "first record"),
        ([eadd()], "0x0", "begins with ECREATE"),
        ([ecreate(), ecreate()], "0x40", "second ECREATE"),
        ([ecreate(), ecreate(tag=b"UNSIZED\0")], "0x40", "second UNSIZED"),
        ([ecreate(), b"EBLOCK\0\0" + bytes(56)], "0x40", "not a record"),
        ([ecreate(), eadd(0x800)], "0x48", "4096-byte aligned"),
        ([ecreate(), eadd(0x1000), eadd(0x1000)], "0x88", "streams rise"),
        ([ecreate(), eadd(0x1000), eadd(0)], "0x88", "streams rise"),
        ([ecreate(), eadd(0, 0x101)], "0x50", "no R, W or X"),
        ([ecreate(), chunk(0)], "0x48", "page added last"),
        ([ecreate(), eadd(), chunk(0x1000)], "0x88", "page added last"),
        ([ecreate(), eadd(0x1000), chunk(0)], "0x88", "page added last"),
        ([ecreate(), eadd(), chunk(0x80)], "0x88", "256-byte aligned"),
        ([ecreate(), eadd(), chunk(0x100), chunk(0x100)], "0x1c8", "comes twice"),
        ([ecreate(), eadd(), chunk(0), unmeasured(0, b"")], "0x1c8", "comes twice"),
        ([ecreate(), eadd(), unmeasured(0, b""), chunk(0)], "0x1c8", "comes twice"),
        ([ecreate(), eadd(), unmeasured(0, b""), unmeasured(0, b"")], "0x1c8", "comes twice"),
        ([ecreate(), eadd(), chunk(0x100), chunk(0)], "0x1c8", "ascending order"),
        ([ecreate(), eadd()[:-1] + b"\1"], "0x58", "hashed as zero"),
        ([ecreate()[:-1] + b"\1"], "0x14", "hashed as zero"),
        ([ecreate(), eadd(), chunk(0)[:60] + b"\1" + chunk(0)[61:]], "0x90", "hashed as zero"),
        ([ecreate(), eadd(), chunk(0)[:-1]], "0xc0", "chunk takes 256"),
        ([ecreate(), eadd()[:-1]], "0x40", "record takes 64"),
        ([ecreate(tag=b"UNSIZED\0")], "0x0", "give the size"),
    ],
)
def test_a_stream_that_is_not_canonical_is_refused_where_it_is_not(
    records: list[bytes], offset: str, why: str
) -> None:
    with pytest.raises(SoftSgxError, match=rf"x\.sgxs: offset {offset}: .*{why}"):
        read(*records)


@pytest.mark.parametrize("size", [0, 0x3000])
def test_a_size_that_ecreate_would_refuse_is_refused_in_the_files_name(size: int) -> None:
    with pytest.raises(SoftSgxError, match=r"x\.sgxs: enclave size"):
        read(ecreate(size))


def test_an_unsized_stream_gets_its_size_in_the_header_and_in_memory() -> None:
    at = 0x1FFE  # across two pages
    stream = b"".join([ecreate(at, b"UNSIZED\0"), eadd(0x1000), chunk(0x1F00), eadd(0x2000)])
    plan = read_sgxs(Bytes("x.sgxs", stream), size=1 << 20).plan
    assert plan.size == 1 << 20
    memory = b"".join(bytes(page.data) for page in plan.pages())
    assert memory[at - 0x1000 : at - 0x1000 + 8] == struct.pack("<Q", 1 << 20)
    sized = b"".join(
        [ecreate(1 << 20), eadd(0x1000), chunk(0x1F00, bytes(0xFE) + b"\0\0"), eadd(0x2000)]
    )
    assert measure(plan) == hashlib.sha256(sized).digest()


def test_pages_out_of_order_cannot_be_a_canonical_stream() -> None:
    plan = Plan(0x4000, (Run(0x1000, 1, 0x203), Run(0, 1, 0x203)))
    with pytest.raises(SoftSgxError, match="rising order"):
        list(write_sgxs(plan))


def test_unmeasured_bytes_are_written_as_unmeasured_records() -> None:
    source = Data(memoryview(bytes(256) + code(PAGE - 256)))
    plan = Plan(0x2000, (Run(0, 1, 0x203, source, 0b10001),))
    stream = b"".join(write_sgxs(plan))
    assert stream.count(b"UNMEASRD") == 14
    again = read(stream)
    assert measure(again) == measure(plan)
    assert bytes(next(again.pages()).data) == bytes(next(plan.pages()).data)


def test_a_heap_is_written_without_data() -> None:
    stream = b"".join(write_sgxs(Blob().heap(1000).plan()))
    assert len(stream) == 64 + 1000 * 64
