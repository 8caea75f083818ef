"""Reading another process's memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import pytest

from softsgx.engines.native import abi, libc

_libc = ctypes.CDLL(None)


def test_pages_are_read_up_to_the_first_that_is_not_there() -> None:
    with mmap.mmap(-1, 4 * abi.PAGE) as area:
        for number in range(4):
            area[number * abi.PAGE] = number + 1
        address = ctypes.addressof(at := ctypes.c_char.from_buffer(area))
        del at
        assert not _libc.mprotect(ctypes.c_void_p(address + 2 * abi.PAGE), abi.PAGE, 0)
        read = [libc.read_pages(os.getpid(), address + n * abi.PAGE, 4 - n) for n in (0, 1, 3)]
        with pytest.raises(OSError, match="cannot read a page"):
            libc.read_pages(os.getpid(), address + 2 * abi.PAGE, 2)
    assert [[page[0] for page in pages] for pages in read] == [[1, 2], [2], [4]]
    assert all(len(page) == abi.PAGE for pages in read for page in pages)


def test_the_kernel_names_the_mapping_that_holds_an_address() -> None:
    with open("/proc/self/maps") as text, open("/proc/self/maps", "rb", buffering=0) as maps:
        lines = [line.rstrip("\n").split(maxsplit=5) for line in text]
        try:
            libc.find_mapping(maps.fileno(), 0)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            pytest.skip("this kernel has no PROCMAP_QUERY (before Linux 6.11)")
        files = [words for words in lines if len(words) > 5 and words[5].startswith("/")]
        for place, *_rest, path in files[:8]:
            start, end = (int(part, 16) for part in place.split("-"))
            assert libc.find_mapping(maps.fileno(), end - 1) == (start, end, path)
        assert libc.find_mapping(maps.fileno(), 0) is None
