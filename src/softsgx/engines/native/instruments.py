"""What a run is examined with: failures on demand, timer interrupts, gdb, a log, a recording."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.engines.native import recording
from softsgx.engines.native.injections import Injections
from softsgx.ondemand import dataclass, field

if TYPE_CHECKING:
    from softsgx.engines.native.gdb.server import GdbServer
    from softsgx.engines.native.syscalls.call_log import CallLog

__all__ = ["Instruments"]


@dataclass(frozen=True, slots=True)
class Instruments:
    """What a run is examined with.

    Attributes:
        injections: failures on demand.
        tick_ns: period of timer interrupts for threads inside enclaves; ``None``: there are none.
        gdb: where a gdb connects that debugs the program; ``None``: none does.  Not with strict.
        calls: logs what the program asks of SGX; ``None``: no log.
        recorder: records uses of pages of enclaves; ``None``: nothing does.
    """

    injections: Injections = field(default_factory=Injections)
    tick_ns: int | None = None
    gdb: GdbServer | None = None
    calls: CallLog | None = None
    recorder: recording.Recorder | None = None

    @property
    def allow_unseen_crossings(self) -> bool:
        """Whether threads may enter and leave enclaves without a stop.

        They may not where entries are counted, logged, stepped or stopped by breakpoints, or where
        threads inside are interrupted.
        """
        injections = self.injections
        counting = injections.power_losses or injections.power_signals
        return not (counting or self.gdb or self.calls or self.tick_ns)
