"""Histories with a plot: tours, workloads, seeded schedules, checkers."""

from softsgx.sim.tour import Chapter, Line, paging_tour

__all__ = ["Chapter", "Line", "paging_tour"]
