"""Units of work done in this process, in others of this machine, or on a Dask cluster.

A unit is what a pure function is called with, so it gives the same result wherever it is done, and
one that was lost is simply done again.  A :class:`Journal` keeps results as they come.
"""

from typing import TYPE_CHECKING

from softsgx.ondemand import on_demand
from softsgx.workers.base import InProcess, Processes, Workers
from softsgx.workers.journal import Journal

if TYPE_CHECKING:
    from softsgx.workers.cluster import DaskCluster, local_cluster

__all__ = ["DaskCluster", "InProcess", "Journal", "Processes", "Workers", "local_cluster"]

__getattr__ = on_demand(__name__, {"cluster": ("DaskCluster", "local_cluster")})
