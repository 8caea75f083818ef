"""The replay engine: no code runs, a trace of page accesses does."""

from softsgx.engines.replay.engine import Replay, ReplayResult
from softsgx.engines.replay.trace import PageTrace, read_trace, write_trace

__all__ = ["PageTrace", "Replay", "ReplayResult", "read_trace", "write_trace"]
