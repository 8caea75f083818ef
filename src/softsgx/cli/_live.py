"""The status socket and the metrics of a command that runs a program."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from softsgx.cli._common import tell
from softsgx.errors import SoftSgxError
from softsgx.live import About, StatusServer

if TYPE_CHECKING:
    from softsgx.live.metrics import MetricsServer

__all__ = ["Live", "add_metrics"]


def add_metrics(output: argparse._ArgumentGroup) -> None:
    """Add the option --metrics."""
    output.add_argument(
        "--metrics",
        metavar="[ADDRESS:]PORT",
        help="let Prometheus scrape the run at a port of 127.0.0.1 (0: any) or of ADDRESS",
    )


class Live:
    """Serves the state of a run from :meth:`start` to :meth:`close`.

    Args:
        state: returns the state of the run.
        verb: of the command line.
        command: the program and its arguments.
        began: date and time of the start.
        quiet: print no message about a socket that cannot be made, or metrics at a known port.
        metrics: where to serve metrics; ``None``: nowhere.

    Raises:
        SoftSgxError: metrics cannot be served there.
    """

    def __init__(
        self,
        state: Callable[[About], dict[str, Any]],
        *,
        verb: str,
        command: Sequence[str],
        began: str,
        quiet: bool,
        metrics: str | None = None,
    ) -> None:
        self._state = partial(state, About(os.getpid(), verb, command, began))
        self._quiet = quiet
        self._status: StatusServer | None = None
        self._metrics = None if metrics is None else _metrics_server(metrics, self._state)

    def start(self) -> None:
        """Start the servers' threads, after the fork of the program's process.

        The run continues without a socket if none can be made.
        """
        try:
            self._status = StatusServer(self._state)
        except OSError as error:
            if not self._quiet:
                tell(f"softsgx: status socket: {error}; softsgx top will not show this run")
        if self._metrics is not None:
            self._metrics.start()
            if self._metrics.any_port or not self._quiet:
                tell(f"softsgx: metrics at {self._metrics.url}")

    def close(self) -> None:
        """Stop the servers."""
        if self._status is not None:
            self._status.close()
            self._status = None
        if self._metrics is not None:
            self._metrics.close()


def _metrics_server(place: str, state: Callable[[], dict[str, Any]]) -> MetricsServer:
    try:
        from softsgx.live.metrics import MetricsServer  # imports an HTTP server
    except ModuleNotFoundError as error:
        raise SoftSgxError(
            "--metrics: prometheus-client is not installed; pip install 'softsgx[metrics]'"
        ) from error
    return MetricsServer(place, state)
