"""Pages that must not be executed although their mapping may be: EPCM entries without X.

Userfaultfd provides holes and write protection, but no protection against fetches.  So the
supervisor makes the program call ``mprotect``, which takes PROT_EXEC from the page.  It defers such
calls until it resumes the program.  Neighbouring pages that are not shown yet lose the right in the
same call, so a heap that grows page by page in a mapping with all rights needs one call a block.

Source:
    mprotect(2); SDM vol. 3D, "Access Control Requirements", "Enclave Page Cache Map".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.engines.native import abi
from softsgx.engines.native.memory.memory_file import EXECUTE, runs
from softsgx.engines.native.memory.page_maps import page_rights

__all__ = ["Fetches"]

_BLOCK_BYTES = 64 * PAGE_BYTES
_PROT_EXEC = abi.PROT_EXEC

Call = tuple[int, ...]


class Fetches:
    """See the module.

    Args:
        prot_at: returns the rights that the mapping of an enclave at an address may have now,
            ``None`` where none is.

    Attributes:
        rights: of each page that is shown, the rights of its EPCM entry.
        due: pages for which calls are to be made.
    """

    __slots__ = ("_prot_at", "_taken", "due", "rights")

    def __init__(self, prot_at: Callable[[int], int | None]) -> None:
        self._prot_at = prot_at
        self.rights = page_rights()
        self._taken: set[int] = set()  # pages that have lost PROT_EXEC
        self.due: set[int] = set()

    def shown(self, page: int, rights: int) -> None:
        """A page is shown."""
        self.rights[page] = rights
        if (page in self._taken) == bool(rights & EXECUTE):
            prot = self._prot_at(page)
            if prot is not None and prot & _PROT_EXEC:
                self.due.add(page)

    def changed(self, page: int, rights: int) -> None:
        """A shown page has these rights now, or had the wrong ones here."""
        self.rights[page] = rights
        self._owe(page)

    def hidden(self, pages: Iterable[int]) -> None:
        """Pages are holes now."""
        for page in pages:
            self.rights.discard(page)

    def mapped(self, start: int, end: int, shown: dict[int, int]) -> None:
        """The program has mapped the range, or changed its rights, and the kernel has set them.

        Args:
            start: of the range.
            end: of the range.
            shown: what ``rights`` has to hold for it.
        """
        self._taken = {page for page in self._taken if not start <= page < end}
        self.hidden(self.within(start, end))
        self.rights.update(shown)
        for page, rights in shown.items():
            if not rights & EXECUTE:
                self._owe(page)

    def within(self, start: int, end: int) -> list[int]:
        """Return the shown pages of a range, lowest first."""
        return list(self.rights.within(start, end))

    def calls(self) -> list[Call]:
        """Return the deferred calls; the caller makes them."""
        if not self.due:
            return []
        due, self.due = self.due, set()
        lose = {page for page in due if not self.rights.get(page, 0) & EXECUTE}
        for block in {page & -_BLOCK_BYTES for page in lose}:
            for page in range(block, block + _BLOCK_BYTES, PAGE_BYTES):
                if page not in self._taken and not self.rights.get(page, 0) & EXECUTE:
                    lose.add(page)
        self._taken |= lose
        self._taken -= due - lose
        wanted: dict[int, list[int]] = {}
        for page in sorted(due | lose):
            prot = self._prot_at(page)
            if prot is not None and prot & abi.PROT_EXEC:
                prot = prot & ~abi.PROT_EXEC if page in lose else prot
                wanted.setdefault(prot, []).append(page)
            else:
                self._taken.discard(page)
        return _protect(wanted)

    def reveal(self, start: int, end: int, prot: int) -> list[Call]:
        """Return the calls that give a range ``prot``, without PROT_EXEC where a page lacks X."""
        calls: list[Call] = [(abi.SYS_MPROTECT, start, end - start, prot)]
        if prot & abi.PROT_EXEC:
            lose = [page for page in self.within(start, end) if not self.rights[page] & EXECUTE]
            self._taken = {page for page in self._taken if not start <= page < end}
            self._taken.update(lose)
            calls += _protect({prot & ~abi.PROT_EXEC: lose})
        return calls

    def _owe(self, page: int) -> None:
        prot = self._prot_at(page)
        if prot is not None and prot & abi.PROT_EXEC:
            self.due.add(page)


def _protect(wanted: dict[int, list[int]]) -> list[Call]:
    return [
        (abi.SYS_MPROTECT, start, end - start, prot)
        for prot, pages in wanted.items()
        for start, end in runs(pages)
    ]


if compiled.speedups is not None:
    compiled.speedups.bind("Fetches", Fetches)
