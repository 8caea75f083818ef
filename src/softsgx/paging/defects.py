"""Known defects of Linux's paging that can be switched on by name.

For tests that must find them, and for people who study them.  Each name selects the broken form at
one place; without it the code behaves as fixed.
"""

from __future__ import annotations

from softsgx.errors import SoftSgxError

__all__ = ["CORE_DEFECTS", "check_defects"]

CORE_DEFECTS: dict[str, str] = {
    "B1": "truncates a PCMD page on ELDU although a neighbour is being evicted (swapfile)",
    "B3": "a cleared PCMD is not marked dirty (swapfile)",
    "B4": "backing is marked dirty before EWB has written it (swapfile)",
    "B6": "backing pages are kept after ELDU (swapfile)",
    "B12": "a poisoned page stays on its LRU list and is evicted (core)",
    "B15": "the free count is changed without a lock (nodes)",
    "B16": "pages are counted free at set-up and again when they are sanitized (core)",
    "B17": "the walk over nodes ends only on a CPU's node that may have no EPC (nodes)",
    "B18": "stopping ksgxd while it sanitizes is reported as a failure (sanitize)",
    "B25": "backing is fetched after the page was blocked; failing then loses it (swap)",
    "B26": "a VA slot stays taken after a failed EWB (swap)",
    "L1": "a page whose EWB failed is freed all the same (swap)",
    "L2": "a failed ELDU destroys PCMD, content and VA slot (swap)",
    "L4": "a VA page is made at every multiple of 512 pages, whatever room there is (va)",
    "L5": "poisoned pages count as free (core)",
    "L6": "a page poisoned while a batch has it is evicted (reclaim)",
    "L7": "direct reclaim goes on for ever when every page is young (core)",
}
"""Name to what goes wrong, and the module where it lives."""


def check_defects(names: frozenset[str], known: dict[str, str]) -> None:
    """Refuse names that are not in ``known``.

    Raises:
        SoftSgxError: names the first unknown one and all there are.
    """
    unknown = sorted(names - known.keys())
    if unknown:
        raise SoftSgxError(f"unknown defect {unknown[0]!r}: give one of {', '.join(sorted(known))}")
