"""Scripted runs: the paging tour, and one story for each known defect."""

from softsgx.sim.tour import Chapter, Line, paging_tour

__all__ = ["Chapter", "Line", "paging_tour"]
