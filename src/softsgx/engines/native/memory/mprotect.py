"""Enclave memory without userfaultfd: every page that is not shown is PROT_NONE.

For each change of a page the supervisor makes the program call ``mprotect``, which costs about
three times as much as userfaultfd.  Faults arrive as SIGSEGV.

Deviation: ``/proc/PID/maps`` shows the rights that pages have at the moment, not those that the
program has set.

Source:
    mprotect(2); sysctl ``vm.max_map_count`` limits how many shown and hidden pages may alternate.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native import abi
from softsgx.engines.native.memory.memory_file import runs

__all__ = ["MprotectPager"]


class MprotectPager:
    """See the module.

    Args:
        inject: makes the program execute system calls at once, each (number, arguments…).
        prot_at: returns the rights that the program has set at an address, ``None`` where no
            enclave is mapped.
    """

    name = "mprotect"

    def __init__(
        self,
        inject: Callable[[list[tuple[int, ...]]], None],
        prot_at: Callable[[int], int | None],
    ) -> None:
        self._inject, self._prot_at = inject, prot_at
        self._shown: dict[int, int] = {}  # rights of EPCM entries
        self._watched: set[int] = set()

    def map_prot(self, prot: int) -> int:
        """Nothing is accessible until it is shown."""
        return abi.PROT_NONE

    def mapped(self, start: int, end: int, prot: int, shown: dict[int, int]) -> None:
        """Give the shown pages of the range their rights."""
        for linaddr in [page for page in self._shown if start <= page < end]:
            self._apply(linaddr)

    def reveal(self, start: int, end: int, prot: int) -> None:
        """Only pages that are shown, and not watched, get rights."""
        calls: list[tuple[int, ...]] = []
        if prot == abi.PROT_NONE:
            calls.append((abi.SYS_MPROTECT, start, end - start, prot))
        else:
            shown = sorted(
                page for page in self._shown if start <= page < end and page not in self._watched
            )
            for rights in sorted({self._rights(page) for page in shown}):
                pages = [page for page in shown if self._rights(page) == rights]
                calls += [
                    (abi.SYS_MPROTECT, low, high - low, prot & rights) for low, high in runs(pages)
                ]
        if calls:
            self._inject(calls)

    def before_hide(self, start: int, end: int) -> None:
        """Take every right away."""
        pages = range(start, end, PAGE_BYTES)
        for linaddr in pages:
            self._shown.pop(linaddr, None)
        self._watched.difference_update(pages)
        mapped = [linaddr for linaddr in pages if self._prot_at(linaddr) is not None]
        calls: list[tuple[int, ...]] = [
            (abi.SYS_MPROTECT, low, high - low, abi.PROT_NONE) for low, high in runs(mapped)
        ]
        if calls:
            self._inject(calls)

    def after_hide(self, start: int, end: int) -> None:
        """Do nothing: the pages have been PROT_NONE since :meth:`before_hide`."""

    def show(self, linaddr: int, data: bytes | bytearray, rights: int) -> bool:
        """Leave it to the caller to fill the file through its descriptor."""
        return False

    def shown(self, linaddr: int, rights: int) -> None:
        """Give the page the rights that both its mapping and its EPCM entry have."""
        self._shown[linaddr] = rights
        self._apply(linaddr)

    def set_rights(self, linaddr: int, rights: int) -> None:
        """Give the page the rights that both its mapping and its EPCM entry have."""
        self.shown(linaddr, rights)

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """Return ``True`` for a shown page that is not watched, and watch it.

        A watched page has no rights; its next use faults, and :meth:`touched` ends the watch.
        """
        if linaddr in self._watched or linaddr not in self._shown:
            return False
        self._watched.add(linaddr)
        self._set(linaddr, abi.PROT_NONE)
        return True

    def flush(self) -> None:
        """Do nothing: this pager defers no calls."""

    def touched(self, linaddr: int, access: int) -> bool:
        """Give a watched page its rights back; ``False``: the page is not watched."""
        if linaddr not in self._watched:
            return False
        self._watched.discard(linaddr)
        self._apply(linaddr)
        return True

    def close(self) -> None:
        """Do nothing: this pager opens no descriptors."""

    def _apply(self, linaddr: int) -> None:
        prot = self._prot_at(linaddr)
        if prot is None or linaddr in self._watched:
            return
        self._set(linaddr, prot & self._rights(linaddr))

    def _rights(self, linaddr: int) -> int:
        """Return the rights of a shown page."""
        return self._shown[linaddr]

    def _set(self, linaddr: int, prot: int) -> None:
        if self._prot_at(linaddr) is not None:
            self._inject([(abi.SYS_MPROTECT, linaddr, PAGE_BYTES, prot)])
