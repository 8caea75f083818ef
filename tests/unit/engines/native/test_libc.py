"""Reading another process's memory."""

from __future__ import annotations

import ctypes
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
