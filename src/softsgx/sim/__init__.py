"""Worked histories: the paging tour, and a story of each known defect."""

from softsgx.sim.tour import Chapter, Line, paging_tour

__all__ = ["Chapter", "Line", "paging_tour"]
