"""What a command that runs a program offers about it meanwhile: its state, at a socket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from softsgx.cli._common import tell
from softsgx.live import About, StatusServer, state
from softsgx.report import Collector

__all__ = ["Live"]


class Live:
    """Offers the state of a run from :meth:`start` to :meth:`stop`.

    Args:
        collector: follows the run.
        verb: of the command line.
        command: the program and its arguments.
        began: date and time of the start.
        quiet: say nothing where no socket can be made.
    """

    def __init__(
        self,
        collector: Collector,
        *,
        verb: str,
        command: Sequence[str],
        began: str,
        quiet: bool,
    ) -> None:
        self._state = partial(state, collector, About(os.getpid(), verb, command, began))
        self._quiet = quiet
        self._status: StatusServer | None = None

    def start(self) -> None:
        """Begin; the program's process exists, since threads must not exist at its fork.

        The run goes on without a socket where none can be made.
        """
        try:
            self._status = StatusServer(self._state)
        except OSError as error:
            if not self._quiet:
                tell(f"softsgx: status socket: {error}; softsgx top will not show this run")

    def stop(self) -> None:
        """End what was begun."""
        if self._status is not None:
            self._status.close()
            self._status = None
