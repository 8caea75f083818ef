"""A log of the SGX calls of a program, one line each, as strace would print them.

A second tracer cannot attach to the program, so the supervisor writes the log.  The log wraps
handlers of system calls: it describes a call that concerns a device, or memory mapped from one,
before the handler changes registers, and writes the line when the result is known.
:class:`~softsgx.engines.native.faults.logged.LoggedTransitions` reports entries by the vDSO.

strace does not show functions of the vDSO.  The log writes an entry when the thread has left its
enclave, with the values that the function puts into its run structure.

Source:
    strace(1); uapi/asm/sgx.h.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import SecInfo, Secs, Vector
from softsgx.driver import (
    AddPages,
    Create,
    Init,
    Ioctl,
    ModifyTypes,
    Provision,
    RemovePages,
    RestrictPermissions,
)
from softsgx.engines.native import abi
from softsgx.engines.native.syscalls import strace
from softsgx.engines.native.syscalls.registry import Registry
from softsgx.engines.native.tracing.loop import Handler
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.layout import Structure
from softsgx.ondemand import dataclass

__all__ = ["CallLog"]

_DEVICES = b"/dev/sgx"
_AT_FDCWD = -100
_LOW_32 = 0xFFFF_FFFF
_SECS_HEAD_BYTES = 64
_LEAVES = {2: "EENTER", 3: "ERESUME", 4: "EEXIT"}
#: Offset of the vDSO function's seventh argument from RBP, above saved RBP and return address.
_RUN_ARGUMENT = 16
_RUN_BYTES, _RUN_HANDLER, _RUN_USER_DATA = 40, 24, 32

Text = Callable[[int], str]
"""Returns the text of a call, given its result."""


@dataclass(frozen=True, slots=True)
class _Struct:
    """A structure of an ioctl.

    Attributes:
        kind: its layout.
        outputs: fields that the driver writes.
    """

    kind: type[Structure]
    outputs: tuple[str, ...] = ()


_STRUCTS = {
    Ioctl.ENCLAVE_CREATE: _Struct(Create),
    Ioctl.ENCLAVE_ADD_PAGES: _Struct(AddPages, ("count",)),
    Ioctl.ENCLAVE_INIT: _Struct(Init),
    Ioctl.ENCLAVE_PROVISION: _Struct(Provision),
    Ioctl.ENCLAVE_RESTRICT_PERMISSIONS: _Struct(RestrictPermissions, ("result", "count")),
    Ioctl.ENCLAVE_MODIFY_TYPES: _Struct(ModifyTypes, ("result", "count")),
    Ioctl.ENCLAVE_REMOVE_PAGES: _Struct(RemovePages, ("count",)),
}


class CallLog:
    """See the module.

    Args:
        write: takes a line, without its end.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._entries: dict[int, tuple[str, str]] = {}

    def watching(self, handlers: dict[int, Handler], registry: Registry) -> dict[int, Handler]:
        """Return the table of handlers; those of logged calls write a line each."""
        describe: dict[int, Callable[[ProgramThread, Registry], Text | None]] = {
            abi.SYS_OPEN: _open,
            abi.SYS_OPENAT: _openat,
            abi.SYS_IOCTL: _ioctl,
            abi.SYS_MMAP: _mmap,
            abi.SYS_MPROTECT: _mprotect,
            abi.SYS_PKEY_MPROTECT: _mprotect,
            abi.SYS_MUNMAP: _munmap,
            abi.SYS_MREMAP: _mremap,
            abi.SYS_MADVISE: _madvise,
        }
        return handlers | {
            number: self._watched(handlers[number], each, registry)
            for number, each in describe.items()
            if number in handlers
        }

    def _watched(
        self,
        handler: Handler,
        describe: Callable[[ProgramThread, Registry], Text | None],
        registry: Registry,
    ) -> Handler:
        def watched(thread: ProgramThread) -> int | None:
            text = describe(thread, registry)
            result = handler(thread)
            if text is None:
                return result
            if result is None:  # the kernel refuses it
                result = thread.finish_syscall()
            self._line(thread, text(result), strace.result(result))
            return result

        return watched

    def entering(self, thread: ProgramThread) -> None:
        """A thread has called our vDSO's function with EENTER; its registers are loaded."""
        self._ended(thread, " <unfinished>")  # the program has left the function by a jump
        regs, image = thread.regs, thread.image
        run_at = _word(image.read(regs.rbp + _RUN_ARGUMENT, 8), 0)
        run = image.read(run_at, _RUN_BYTES)
        handler, data = _word(run, _RUN_HANDLER), _word(run, _RUN_USER_DATA)
        registers = (regs.rdi, regs.rsi, regs.rdx)
        arguments = [*map(strace.pointer, registers), "EENTER"]
        arguments += map(strace.pointer, (regs.r8, regs.r9))
        given = f"tcs={_word(run, 0):#x}, user_handler={strace.pointer(handler)}"
        given += f", user_data={data:#x}"
        text = f"__vdso_sgx_enter_enclave({', '.join(arguments)}, {{{given}%s}})"
        self._entries[thread.tid] = text, "? (what user_handler returns)" if handler else "0"

    def exited(self, thread: ProgramThread) -> None:
        """EEXIT has returned to our vDSO."""
        self._ended(thread, ", function=EEXIT")

    def excepted(self, thread: ProgramThread) -> None:
        """Our vDSO is about to report an exception; the registers of its fix-up are loaded."""
        regs = thread.regs
        leaf, vector = _LEAVES.get(regs.rax, str(regs.rax)), regs.rdi
        name = f"#{Vector(vector).name}" if vector in set(Vector) else str(vector)
        told = f", function={leaf}, exception_vector={name}"
        told += f", exception_error_code={regs.rsi:#x}, exception_addr={strace.pointer(regs.rdx)}"
        self._ended(thread, told)

    def _ended(self, thread: ProgramThread, told: str) -> None:
        """Write the entry of a thread that is inside, if there is one; ``told``: how it ended."""
        entry = self._entries.pop(thread.tid, None)
        if entry is not None:
            text, result = entry
            self._line(thread, text % told, result)

    def _line(self, thread: ProgramThread, call: str, result: str) -> None:
        self._write(f"[pid {thread.tid}] {call} = {result}")


# --- texts of calls; None for a call that does not concern SGX ---------------------------------


def _open(thread: ProgramThread, _registry: Registry) -> Text | None:
    regs = thread.regs
    return _opened(thread, "open(", regs.rdi, regs.rsi)


def _openat(thread: ProgramThread, _registry: Registry) -> Text | None:
    regs = thread.regs
    directory = _int32(regs.rdi)
    words = "AT_FDCWD" if directory == _AT_FDCWD else str(directory)
    return _opened(thread, f"openat({words}, ", regs.rsi, regs.rdx)


def _opened(thread: ProgramThread, begin: str, path: int, flags: int) -> Text | None:
    name = thread.image.read_string(path)
    if not name.startswith(_DEVICES):
        return None
    text = f'{begin}"{name.decode(errors="backslashreplace")}", {strace.open_flags(flags)})'
    return lambda _result: text


def _ioctl(thread: ProgramThread, registry: Registry) -> Text | None:
    regs, image = thread.regs, thread.image
    descriptor, number, at = regs.rdi & _LOW_32, regs.rsi & _LOW_32, regs.rdx
    if registry.of_descriptor(thread.tid, descriptor) is None:
        return None
    begin = f"ioctl({_int32(descriptor)}, {strace.command(number)}, "
    struct = _STRUCTS.get(Ioctl(number)) if number in set(Ioctl) else None
    data = b"" if struct is None else image.read(at, struct.kind.SIZE)
    if struct is None or len(data) < struct.kind.SIZE:
        return lambda _result: f"{begin}{strace.pointer(at)})"
    kind, before = struct.kind, struct.kind.unpack(data)
    words = {
        name: _field(thread, name, int(getattr(before, name)), kind)
        for name in kind.OFFSETS
        if name not in struct.outputs
    }
    outputs = struct.outputs

    def text(_result: int) -> str:
        given = [f"{name}={word}" for name, word in words.items()]
        after = image.read(at, kind.SIZE)
        if len(after) == kind.SIZE:
            told = kind.unpack(after)
            given += [f"{name}=>{_number(int(getattr(told, name)))}" for name in outputs]
        return f"{begin}{{{', '.join(given)}}})"

    return text


def _field(thread: ProgramThread, name: str, value: int, kind: type[Structure]) -> str:
    """Return the text of a field of an ioctl's structure."""
    match name:
        case "src" if kind is Create:
            return _secs(thread, value)
        case "secinfo":
            data = thread.image.read(value, SecInfo.SIZE)
            if len(data) < SecInfo.SIZE:
                return strace.pointer(value)
            return f"{{flags={strace.secinfo(SecInfo.unpack(data).flags)}}}"
        case "flags":
            return "SGX_PAGE_MEASURE" if value == 1 else hex(value)
        case "permissions":
            return strace.permissions(value)
        case "page_type":
            return strace.page_type(value)
        case "fd":
            return str(value)
        case "src" | "sigstruct":
            return strace.pointer(value)
        case _:
            return _number(value)


def _secs(thread: ProgramThread, address: int) -> str:
    data = thread.image.read(address, Secs.SIZE)
    if len(data) < Secs.SIZE:
        return strace.pointer(address)
    secs = Secs.unpack(data)
    flags, xfrm = secs.attributes.flags, secs.attributes.xfrm
    return (
        f"{{size={secs.size:#x}, base={secs.base:#x}, ssaframesize={secs.ssa_frame_size}, "
        f"miscselect={secs.miscselect:#x}, attributes={strace.attributes(flags)}, "
        f"xfrm={strace.xfrm(xfrm)}}}"
    )


def _mmap(thread: ProgramThread, registry: Registry) -> Text | None:
    regs = thread.regs
    device = None
    if not regs.r10 & abi.MAP_ANONYMOUS:
        device = registry.of_descriptor(thread.tid, regs.r8 & _LOW_32)
    displaces = regs.r10 & abi.MAP_FIXED and _is_enclaves(thread, regs.rdi, regs.rsi)
    if device is None and not displaces:
        return None
    text = (
        f"mmap({strace.pointer(regs.rdi)}, {regs.rsi}, {strace.protection(regs.rdx)}, "
        f"{strace.mapping(regs.r10)}, {_int32(regs.r8)}, {_number(regs.r9)})"
    )
    return lambda _result: text


def _mprotect(thread: ProgramThread, _registry: Registry) -> Text | None:
    regs = thread.regs
    name = "mprotect" if regs.orig_rax == abi.SYS_MPROTECT else "pkey_mprotect"
    key = "" if name == "mprotect" else f", {_int32(regs.r10)}"
    words = f"{regs.rdi:#x}, {regs.rsi}, {strace.protection(regs.rdx)}{key}"
    return _on_enclaves(thread, f"{name}({words})")


def _munmap(thread: ProgramThread, _registry: Registry) -> Text | None:
    return _on_enclaves(thread, f"munmap({thread.regs.rdi:#x}, {thread.regs.rsi})")


def _mremap(thread: ProgramThread, _registry: Registry) -> Text | None:
    regs = thread.regs
    words = f"{regs.rdi:#x}, {regs.rsi}, {regs.rdx}, {strace.remapping(regs.r10)}, {regs.r8:#x}"
    return _on_enclaves(thread, f"mremap({words})")


def _madvise(thread: ProgramThread, _registry: Registry) -> Text | None:
    regs = thread.regs
    words = f"{regs.rdi:#x}, {regs.rsi}, {strace.advice(regs.rdx)}"
    return _on_enclaves(thread, f"madvise({words})")


def _on_enclaves(thread: ProgramThread, text: str) -> Text | None:
    """Return ``text`` for a call whose first arguments are a range with an enclave in it."""
    found = _is_enclaves(thread, thread.regs.rdi, thread.regs.rsi)
    return (lambda _result: text) if found else None


def _is_enclaves(thread: ProgramThread, start: int, size: int) -> bool:
    return bool(size and start < abi.TASK_SIZE and thread.image.mm.vmas(start, start + size))


def _number(value: int) -> str:
    return hex(value) if value else "0"


def _int32(value: int) -> int:
    value &= _LOW_32
    return value - (1 << 32) if value >> 31 else value


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")
