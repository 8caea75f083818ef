"""The replay engine: no code runs, a trace of page accesses does."""

from softsgx.engines.replay.engine import Replay, ReplayResult

__all__ = ["Replay", "ReplayResult"]
