"""The ``misc.*`` files of a group, as text.

Reading and writing them are system calls, so errors are ``OSError``.

Source:
    ``misc_cg_*_show()`` and ``misc_cg_max_write()``, kernel/cgroup/misc.c; "Miscellaneous
    controller" in Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os

from softsgx.arch import PAGE_BYTES
from softsgx.cgroup.group import EpcCgroup
from softsgx.ondemand import pattern

__all__ = ["KEY", "file_names", "read_file", "write_file"]

KEY = "sgx_epc"
_U64_MAX = (1 << 64) - 1
_MOST_DIGITS = 22  # of a number of 64 bits, in base 8
_SPACES = " \t\n\v\f\r"
#: The digits of the base that the prefix selects.
_DIGITS = pattern(r"0[xX](?P<hex>[0-9a-fA-F]+)|0[0-7]*|[1-9][0-9]*")


def file_names(group: EpcCgroup) -> list[str]:
    """Return the files that the group has: the capacity only at the root, limits only below it."""
    if group.parent is None:
        return ["misc.capacity", "misc.current", "misc.peak"]
    return ["misc.current", "misc.events", "misc.events.local", "misc.max", "misc.peak"]


def read_file(group: EpcCgroup, name: str) -> str:
    """Return a file's text, each line ``key value``; no line when the machine has no EPC.

    Raises:
        OSError: ENOENT: the group has no such file.
    """
    if name not in file_names(group):
        raise _error(errno.ENOENT, name)
    if not group.hierarchy.capacity_pages:
        return ""
    match name:
        case "misc.capacity":
            value = str(group.hierarchy.capacity_pages * PAGE_BYTES)
        case "misc.current":
            value = str(group.usage_pages * PAGE_BYTES)
        case "misc.peak":
            value = str(group.peak_pages * PAGE_BYTES)
        case "misc.max":
            value = "max" if group.max_pages is None else str(group.max_pages * PAGE_BYTES)
        case _:
            count = group.events if name == "misc.events" else group.events_local
            return f"{KEY}.max {count}\n"
    return f"{KEY} {value}\n"


def write_file(group: EpcCgroup, name: str, text: str) -> None:
    """Write ``sgx_epc BYTES`` or ``sgx_epc max`` to ``misc.max``; bytes are rounded down to pages.

    White space around the line is ignored.  One space separates key and number.  The number is
    decimal, hexadecimal after ``0x``, or octal after ``0``, with an optional ``+``.

    If the usage is near the limit or above it, ksgxd runs a batch at once; while it is above, the
    next charge has to reclaim first.

    Raises:
        OSError: EINVAL (no such key, no number), ERANGE (beyond 64 bits), E2BIG (more than a
            page of text), ENOENT, EACCES.
    """
    if name not in file_names(group):
        raise _error(errno.ENOENT, name)
    if name != "misc.max":
        raise _error(errno.EACCES, name)
    if len(text.encode(errors="surrogatepass")) > PAGE_BYTES:
        raise _error(errno.E2BIG, name)
    key, space, value = text.partition("\0")[0].strip(_SPACES).partition(" ")
    if key != KEY or not space:
        raise _error(errno.EINVAL, name)
    limit = None if value == "max" else _kstrtou64(value, name) // PAGE_BYTES
    if not group.hierarchy.capacity_pages:
        raise _error(errno.EINVAL, name)
    group.max_pages = limit
    if limit is not None and group.hierarchy.request_reclaim is not None and group.should_reclaim():
        group.hierarchy.request_reclaim(group)


def _kstrtou64(text: str, name: str) -> int:
    """Return the number in ``text``; its prefix selects the base.

    Raises:
        OSError: ERANGE: the digits exceed 64 bits, whatever follows them; EINVAL: the text does not
            begin with a digit, or has other characters.

    Source:
        ``kstrtou64()`` with base 0, lib/kstrtox.c.
    """
    text = text.removeprefix("+")
    digits = _DIGITS.match(text)
    if digits is None:
        raise _error(errno.EINVAL, name)
    base = 16 if digits["hex"] else 8 if text[0] == "0" else 10
    value = digits["hex"] or digits[0]
    # Count the digits first, since Python refuses to convert thousands of them.
    if len(value.lstrip("0")) > _MOST_DIGITS or int(value, base) > _U64_MAX:
        raise _error(errno.ERANGE, name)
    if text[digits.end() :] not in ("", "\n"):
        raise _error(errno.EINVAL, name)
    return int(value, base)


def _error(number: int, name: str) -> OSError:
    return OSError(number, os.strerror(number), name)
