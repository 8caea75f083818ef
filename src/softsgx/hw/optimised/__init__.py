"""Second implementations of leaves, where they are hot: EADD, EBLOCK, EWB, ELDU, EENTER, EEXIT.

The specification (``hw.leaves``, ``hw.entry`` …) does not import this package, which import-linter
checks; a machine is given it.  Each function looks whether the case at hand is the plain one that
succeeds and does it in one piece; otherwise it falls back to the readable leaf, with no state
changed.  ``tests/differential`` runs both on the same histories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softsgx.hw.leaves.enclu import EncluLeaves
from softsgx.hw.optimised.building import building_leaves
from softsgx.hw.optimised.entry import entry_leaves, try_virtual_exit
from softsgx.hw.optimised.paging import paging_leaves
from softsgx.hw.processor import LogicalProcessor

__all__ = ["OPTIMISED", "try_virtual_exit"]


class _Optimised:
    def kernel(self, cpu: LogicalProcessor) -> Mapping[str, Callable[..., Any]]:
        return {**paging_leaves(cpu), **building_leaves(cpu)}

    def user(self, cpu: LogicalProcessor, leaves: EncluLeaves) -> Mapping[str, Callable[..., Any]]:
        # A guest's processor exits to its host in the middle of leaves.
        return entry_leaves(cpu, leaves.eenter, leaves.eexit) if not cpu.vmx_nonroot else {}


OPTIMISED = _Optimised()
"""What :class:`softsgx.hw.Machine` takes as ``optimised``."""
