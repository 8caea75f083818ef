"""Limits on EPC for groups of processes: charging, ``misc.*`` files, out-of-memory kills.

Implements :class:`~softsgx.paging.Group`, a protocol of the core; knows neither driver nor guests.
"""

from typing import TYPE_CHECKING

from softsgx.cgroup.group import EpcCgroup, Hierarchy, Victim, group_name_ok
from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.cgroup.events import ChargeRefused, VictimKilled
    from softsgx.cgroup.files import KEY, file_names, read_file, write_file

__all__ = [
    "KEY",
    "ChargeRefused",
    "EpcCgroup",
    "Hierarchy",
    "Victim",
    "VictimKilled",
    "file_names",
    "group_name_ok",
    "read_file",
    "write_file",
]

__getattr__ = on_demand(
    __name__,
    {
        "events": (
            "ChargeRefused",
            "VictimKilled",
        ),
        "files": (
            "KEY",
            "file_names",
            "read_file",
            "write_file",
        ),
    },
)
