"""The replay engine: no code runs, a trace of page accesses does."""

from softsgx.engines.replay.engine import Replay, ReplayResult
from softsgx.engines.replay.trace import PageTrace, parse_trace, read_trace, write_trace

__all__ = ["PageTrace", "Replay", "ReplayResult", "parse_trace", "read_trace", "write_trace"]
