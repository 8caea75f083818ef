"""A gdb remote stub in the supervisor: gdb debugs the program, and debug enclaves in it.

=============== ===================================================================
:mod:`.packets`  the framing of gdb's remote protocol
:mod:`.session`  the requests in packets, and their answers
:mod:`.loop`     the tracer's loop with stops for gdb
:mod:`.target`   registers, memory and breakpoints of the program's threads
=============== ===================================================================

A process has one tracer, the supervisor, so gdb cannot attach to the program itself.
"""

from typing import TYPE_CHECKING

from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.engines.native.gdb.loop import DebugLoop
    from softsgx.engines.native.gdb.symbols import EnclaveFiles

__all__ = ["DebugLoop", "EnclaveFiles"]

__getattr__ = on_demand(__name__, {"loop": ("DebugLoop",), "symbols": ("EnclaveFiles",)})
