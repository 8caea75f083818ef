"""Values of system calls in words.

Goal: no bit of a value is lost, and the words are strace's.  Method: examples, and every flag.
"""

from __future__ import annotations

import pytest

from softsgx.driver import Ioctl
from softsgx.engines.native import abi
from softsgx.engines.native.syscalls import strace


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3, "3"),
        (0x7F00_0000_1000, "0x7f0000001000"),
        (-22, "-1 EINVAL (Invalid argument)"),
        (-25, "-1 ENOTTY (Inappropriate ioctl for device)"),
        (-512, "? ERESTARTSYS (To be restarted if SA_RESTART is set)"),
    ],
)
def test_results_are_numbers_or_errors_with_their_names(value: int, text: str) -> None:
    assert strace.result(value) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (strace.protection(0), "PROT_NONE"),
        (strace.protection(5), "PROT_READ|PROT_EXEC"),
        (strace.protection(0x10), "0x10"),
        (strace.mapping(0x11), "MAP_SHARED|MAP_FIXED"),
        (strace.mapping(0x22 | 1 << 30), "MAP_PRIVATE|MAP_ANONYMOUS|0x40000000"),
        (strace.open_flags(abi.O_RDWR | abi.O_CLOEXEC), "O_RDWR|O_CLOEXEC"),
        (strace.advice(4), "MADV_DONTNEED"),
        (strace.advice(77), "0x4d"),
        (strace.remapping(3), "MREMAP_MAYMOVE|MREMAP_FIXED"),
        (strace.command(Ioctl.ENCLAVE_CREATE), "SGX_IOC_ENCLAVE_CREATE"),
        (strace.command(0xA4FF), "_IOC(0xa4, 0xff, 0x0)"),
        (strace.secinfo(0x205), "R|X|REG"),
        (strace.secinfo(0x100), "0|TCS"),
        (strace.permissions(0), "0"),
        (strace.page_type(4), "TRIM"),
        (strace.attributes(6), "DEBUG|MODE64BIT"),
        (strace.xfrm(7), "X87|SSE|AVX"),
        (strace.pointer(0), "NULL"),
    ],
)
def test_values_are_in_the_words_of_strace(found: str, text: str) -> None:
    assert found == text
