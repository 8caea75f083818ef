"""The status of a run while it runs, for other processes of the user."""

from typing import TYPE_CHECKING

from softsgx.live.endpoint import StatusServer, status_directories
from softsgx.live.state import FORMAT, About, state
from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.live.ordinary import OrdinaryState
    from softsgx.live.runs import NoAnswer, RunEnded, ask, running_pids, socket_of

__all__ = [
    "FORMAT",
    "About",
    "NoAnswer",
    "OrdinaryState",
    "RunEnded",
    "StatusServer",
    "ask",
    "running_pids",
    "socket_of",
    "state",
    "status_directories",
]

__getattr__ = on_demand(
    __name__,
    {
        "ordinary": ("OrdinaryState",),
        "runs": ("NoAnswer", "RunEnded", "ask", "running_pids", "socket_of"),
    },
)
