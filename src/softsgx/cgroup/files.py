"""The ``misc.*`` files of a group, as text: what operators read and write.

Writing and reading them are system calls, so what they refuse is an ``OSError``.

Source:
    ``misc_cg_*_show()`` and ``misc_cg_max_write()``, kernel/cgroup/misc.c; "Miscellaneous
    controller" in Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os

from softsgx.cgroup.group import EpcCgroup

__all__ = ["KEY", "file_names", "read_file", "write_file"]

KEY = "sgx_epc"
_PAGE = 4096
_U64_MAX = (1 << 64) - 1


def file_names(group: EpcCgroup) -> list[str]:
    """Return the files that the group has: the capacity only at the root, limits only below it."""
    if group.parent is None:
        return ["misc.capacity", "misc.current", "misc.peak"]
    return ["misc.current", "misc.events", "misc.events.local", "misc.max", "misc.peak"]


def read_file(group: EpcCgroup, name: str) -> str:
    """Return a file's text, each line ``key value``; no line when the machine has no EPC.

    Raises:
        OSError: ENOENT, no such file in this group.
    """
    if name not in file_names(group):
        raise _error(errno.ENOENT, name)
    if not group.hierarchy.capacity_pages:
        return ""
    match name:
        case "misc.capacity":
            value = str(group.hierarchy.capacity_pages * _PAGE)
        case "misc.current":
            value = str(group.usage_pages * _PAGE)
        case "misc.peak":
            value = str(group.peak_pages * _PAGE)
        case "misc.max":
            value = "max" if group.max_pages is None else str(group.max_pages * _PAGE)
        case _:
            count = group.events if name == "misc.events" else group.events_local
            return f"{KEY}.max {count}\n"
    return f"{KEY} {value}\n"


def write_file(group: EpcCgroup, name: str, text: str) -> None:
    """Write ``sgx_epc BYTES`` or ``sgx_epc max`` to ``misc.max``; bytes are rounded down to pages.

    A limit below the usage takes effect with the next charge, which has to reclaim first; a batch
    is asked for at once.

    Raises:
        OSError: EINVAL (no such key, no number), ERANGE (beyond 64 bits), ENOENT, EACCES.
    """
    if name not in file_names(group):
        raise _error(errno.ENOENT, name)
    if name != "misc.max":
        raise _error(errno.EACCES, name)
    key, space, value = text.strip().partition(" ")
    if key != KEY or not space or not group.hierarchy.capacity_pages:
        raise _error(errno.EINVAL, name)
    value = value.strip()
    if value == "max":
        group.max_pages = None
        return
    if not value.isascii() or not value.isdigit():
        raise _error(errno.EINVAL, name)
    if int(value) > _U64_MAX:
        raise _error(errno.ERANGE, name)
    group.max_pages = int(value) // _PAGE
    if group.hierarchy.request_reclaim is not None and group.should_reclaim():
        group.hierarchy.request_reclaim(group)


def _error(number: int, name: str) -> OSError:
    return OSError(number, os.strerror(number), name)
