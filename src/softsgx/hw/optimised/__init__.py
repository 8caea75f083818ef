"""Second implementations of hot leaves: EADD, EBLOCK, ETRACK, EWB, ELDU, EENTER, EEXIT.

The specification (``hw.leaves``, ``hw.entry`` …) does not import this package, which import-linter
checks; a machine takes it as an argument.  Each function handles the plain case that succeeds in
one step; otherwise it falls back to the readable leaf, and no state has changed.
``tests/differential`` runs both on the same histories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softsgx.hw.leaves.enclu import EncluLeaves
from softsgx.hw.processor import LogicalProcessor

__all__ = ["OPTIMISED", "PLAIN"]


class _Plain:
    def kernel(self, cpu: LogicalProcessor) -> Mapping[str, Callable[..., Any]]:
        from softsgx.hw.optimised import building, paging

        return {**paging.paging_leaves(cpu), **building.building_leaves(cpu)}

    def user(self, cpu: LogicalProcessor, leaves: EncluLeaves) -> Mapping[str, Callable[..., Any]]:
        from softsgx.hw.optimised.entry import entry_leaves

        # The leaves of a guest's processor end with VM exits.
        return entry_leaves(cpu, leaves.eenter, leaves.eexit) if not cpu.vmx_nonroot else {}


class _Compiled(_Plain):
    def kernel(self, cpu: LogicalProcessor) -> Mapping[str, Callable[..., Any]]:
        from softsgx.hw.optimised import building, paging

        return {**paging.compiled_leaves(cpu), **building.building_leaves(cpu)}


OPTIMISED = _Compiled()
"""What :class:`softsgx.hw.Machine` takes as ``optimised``."""
PLAIN = _Plain()
"""The same, all in Python."""
