"""Runs units of work in this process, in other processes of this machine, or on a Dask cluster.

A unit is the argument of a pure function, so its result does not depend on the worker, and a lost
unit is run again.  A :class:`Journal` keeps results as they arrive.
"""

from typing import TYPE_CHECKING

from softsgx.ondemand import on_demand
from softsgx.workers.base import InProcess, Processes, Workers
from softsgx.workers.journal import Journal

if TYPE_CHECKING:
    from softsgx.workers.cluster import DaskCluster, local_cluster

__all__ = ["DaskCluster", "InProcess", "Journal", "Processes", "Workers", "local_cluster"]

__getattr__ = on_demand(__name__, {"cluster": ("DaskCluster", "local_cluster")})
