"""Running the tests of the native engine in another mode than they ask for.

``pytest tests/e2e --native-mode WORD[,WORD…]``: every program that a test starts by the engine, in
this process or by the command ``softsgx``, runs

``mprotect``     with that pager
``userfaultfd``  likewise
``stops``        without permits: each entry and each exit of an enclave stops
``signals``      so that each fault on enclave memory is a signal, and none an event
``strict``       in strict mode, except under gdb
``recorded``     with all pages hidden each millisecond, except under gdb

Programs of other processes learn it from the environment (``sitecustomize.py``).
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["VARIABLE", "WORDS", "apply", "apply_everywhere", "has"]

VARIABLE = "SOFTSGX_TEST_MODE"
WORDS = ("mprotect", "userfaultfd", "signals", "stops", "strict", "recorded")
_PAGERS = {"mprotect", "userfaultfd"}
_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]


def apply_everywhere(mode: str) -> None:
    """Let runs of this process, and of those that it starts, be in this mode.

    Raises:
        ValueError: a word is not known.
    """
    apply(mode)
    paths = [str(_HERE), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ |= {VARIABLE: mode, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def apply(mode: str) -> None:
    """Let runs of this process be in this mode.

    Raises:
        ValueError: a word is not known.
    """
    words = set(mode.split(","))
    unknown = words - set(WORDS)
    if unknown:
        raise ValueError(f"{min(unknown)!r}: no mode; modes are {', '.join(WORDS)}")
    supervisor: Any = import_module("softsgx.engines.native.supervisor")
    Instruments: Any = import_module("softsgx.engines.native.instruments").Instruments  # noqa: N806
    Recorder: Any = import_module("softsgx.engines.native.recording").Recorder  # noqa: N806
    if "signals" in words:
        waits: Any = import_module("softsgx.engines.native.tracing.waits")
        waits.can_wait_for_events = lambda: False
    if "stops" in words:
        supervisor.can_cross_unseen = lambda: False
    begin = supervisor.Supervisor.__init__

    def begin_in_mode(self: Any, *arguments: Any, **named: Any) -> None:
        for pager in words & _PAGERS:
            named["pager"] = pager
        instruments = named.get("instruments") or Instruments()
        if "strict" in words and instruments.gdb is None:
            named["strict"] = True
        if "recorded" in words and instruments.gdb is None and instruments.recorder is None:
            recorder = Recorder(_Nowhere(), interval_ns=1_000_000)
            named["instruments"] = replace(instruments, recorder=recorder)
        begin(self, *arguments, **named)

    supervisor.Supervisor.__init__ = begin_in_mode


class _Nowhere:
    """Takes accesses and keeps none."""

    def add_enclave(self, _name: str, _pages: int, _pid: int) -> int:
        return 0

    def append(self, _enclave: int, _page: int, _write: bool, _time_ns: int) -> None:
        pass

    def remove_page(self, _enclave: int, _page: int, _time_ns: int) -> None:
        pass

    def end_enclave(self, _enclave: int, _time_ns: int) -> None:
        pass

    def add_late_interval(self) -> None:
        pass

    def flush(self) -> None:
        pass


def has(*words: str) -> bool:
    """Return whether the tests run in a mode with one of these words."""
    return not set(os.environ.get(VARIABLE, "").split(",")).isdisjoint(words)
