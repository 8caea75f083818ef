"""Which lines of the package have been executed: one event a line, so that watching is cheap.

Python has this since 3.12 (``sys.monitoring``).  Before, :class:`NewLines` sees no lines, and a
fuzzer uses only the results of its parsers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType
from typing import Any

import softsgx

__all__ = ["NewLines"]

_PACKAGE = str(Path(softsgx.__file__).parent)


class NewLines:
    """Lines of ``softsgx`` that were executed since this was made, each seen once.

    One at a time watches: use it as a context manager.

    Attributes:
        seen: how many there are.
    """

    def __init__(self) -> None:
        self._lines: set[tuple[str, int]] = set()
        self._monitoring: Any = getattr(sys, "monitoring", None)

    def __enter__(self) -> NewLines:
        if self._monitoring is not None:
            tool, events = self._monitoring.COVERAGE_ID, self._monitoring.events
            self._monitoring.use_tool_id(tool, "softsgx soak")
            self._monitoring.register_callback(tool, events.LINE, self._executed)
            self._monitoring.set_events(tool, events.LINE)
            self._monitoring.restart_events()
        return self

    def __exit__(self, *_: object) -> None:
        if self._monitoring is not None:
            self._monitoring.set_events(self._monitoring.COVERAGE_ID, 0)
            self._monitoring.free_tool_id(self._monitoring.COVERAGE_ID)

    def _executed(self, code: CodeType, line: int) -> Any:
        if code.co_filename.startswith(_PACKAGE):
            self._lines.add((code.co_filename, line))
        return self._monitoring.DISABLE  # this line: it is known now

    @property
    def seen(self) -> int:
        """Return how many lines were executed so far."""
        return len(self._lines)
