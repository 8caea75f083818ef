"""Reads the states of runs repeatedly, and computes rates from one reading to the next.

A state has counts, not rates: so clients that read at different times get the right rates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from softsgx.live.runs import NoAnswer, RunEnded, ask, running_pids

__all__ = ["FORMAT", "RATES", "Watched", "Watching"]

FORMAT = "softsgx-top/1"
RATES = ("faults", "evictions", "reloads", "eenter")
"""The counts that get rates."""
_HISTORY = 240


class Watched:
    """One run.

    Attributes:
        pid: process of its supervisor.
        state: its latest state, with ``rates``; empty before the first answer.
        silent: why it does not answer now; empty: it does.
        history: faults a second between readings, the latest last.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.silent = pid, ""
        self.state: dict[str, Any] = {}
        self.history: deque[float] = deque(maxlen=_HISTORY)

    def look(self) -> None:
        """Read the state.

        Raises:
            RunEnded: the run has ended; the last state stays.
        """
        try:
            state = ask(self.pid)
        except NoAnswer as error:
            self.silent = str(error)
            return
        self.silent = ""
        self.add(state)

    def add(self, state: dict[str, Any]) -> None:
        """Add rates to a state, and make it the latest one.

        They are averages since the last reading; at the first reading, and for new enclaves, they
        are averages since the start.
        """
        if self.state.get("began") != state["began"]:  # another run with the same process id
            self.state = {}
            self.history.clear()
        seconds = state["elapsed_seconds"] - self.state.get("elapsed_seconds", 0.0)
        before = {enclave["number"]: enclave for enclave in self.state.get("enclaves", ())}
        state["rates"] = rates(state["totals"], self.state.get("totals", {}), seconds)
        for enclave in state["enclaves"]:
            enclave["rates"] = rates(enclave, before.get(enclave["number"], {}), seconds)
        self.history.append(state["rates"]["faults_per_second"])
        self.state = state


class Watching:
    """The runs of this user, or one of them.

    Args:
        pid: of the only run to watch; ``None``: all runs.

    Attributes:
        runs: those that exist, in the order of their supervisors' process ids.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self.runs: list[Watched] = []

    def look(self) -> bool:
        """Read each run; ``False``: all have ended, and :attr:`runs` has the last ones."""
        known = {run.pid: run for run in self.runs}
        pids = running_pids() if self._pid is None else [self._pid]
        found = []
        for pid in pids:
            run = known.get(pid) or Watched(pid)
            try:
                run.look()
            except RunEnded:
                continue
            found.append(run)
        if found:
            self.runs = found
        return bool(found)

    def document(self) -> dict[str, Any]:
        """Return the latest readings as one object."""
        return {
            "format": FORMAT,
            "runs": [run.state for run in self.runs if run.state and not run.silent],
            "silent": {str(run.pid): run.silent for run in self.runs if run.silent},
        }


def rates(now: Mapping[str, Any], before: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Return how often a second each of :data:`RATES` happened."""
    return {
        f"{name}_per_second": round((now[name] - before.get(name, 0)) / seconds, 1)
        if seconds > 0
        else 0.0
        for name in RATES
    }
