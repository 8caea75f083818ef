"""System calls that name files: opening, inspecting and changing the nodes that are not there.

A node is found by every path that leads to it, from any directory and through links (``walk.py``);
files of groups and ``/proc/cpuinfo`` are found by their absolute names only.  A file of text is a
memory file with what it holds at the moment it is opened, sealed against changes.

Deviation: the nodes are not listed in ``/dev``, and the directories cannot be opened.

Deviation: stat returns permissions that chmod has set, but they are not enforced.

Source:
    open(2), stat(2), statx(2), access(2), readlink(2), chmod(2), chown(2), utimensat(2),
    getxattr(2), statfs(2), truncate(2), mknod(2); what tmpfs answers for a device node.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Callable
from errno import EACCES, EEXIST, EFAULT, EINVAL, EISDIR, ENODATA, ENOTDIR, EPERM
from typing import NamedTuple, Protocol

from softsgx.driver import EnclaveFile, ProvisionFile
from softsgx.engines.native import abi, libc
from softsgx.engines.native.mappings import maps_lines
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.syscalls.nodes import ENCLAVE, PROVISION, Node, Nodes
from softsgx.engines.native.syscalls.registry import Device, Registry
from softsgx.engines.native.syscalls.walk import Walks
from softsgx.engines.native.tracing.filters import watch_devices
from softsgx.engines.native.tracing.loop import Handler
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.ondemand import pattern

__all__ = ["NamedFiles", "Opener"]

_PROC = b"/proc/"
_LINK = pattern(rb"(?:/proc/(self|thread-self|\d+)|/dev)/fd/(\d+)")
_OF_PROCESS = pattern(rb"/proc/(?P<pid>self|thread-self|\d+)(/task/\d+)?/(?P<what>mem|maps)")
_SEALED = abi.F_SEAL_SEAL | abi.F_SEAL_SHRINK | abi.F_SEAL_GROW | abi.F_SEAL_WRITE
_PERMISSIONS = 0o7777
_HOW = struct.Struct("<QQQ")  # struct open_how
_UNCHANGED = 0xFFFF_FFFF


class _Place(NamedTuple):
    """A path in the program's memory: where it is, where it starts, whether a last link counts."""

    directory: int
    path: int
    follow: bool


class Opener(Protocol):
    """The driver, as far as opening goes."""

    def open_enclave(self, thread: ProgramThread) -> EnclaveFile:
        """Open ``/dev/sgx_enclave``; ``OSError`` when it is refused."""

    def open_provision(self, thread: ProgramThread) -> ProvisionFile:
        """Open ``/dev/sgx_provision``; ``OSError`` when it is refused."""


class NamedFiles:
    """Handlers of system calls that name files: a result, or ``None`` to let the call run.

    Args:
        opener: opens devices.
        registry: which descriptors are devices.
        nodes: the names that exist for the program only.
        open_memory: lets an open of ``/proc/PID/mem`` be made, and returns its result.
        image_of: returns the address space of a process or thread, ``None`` for other programs.
    """

    def __init__(
        self,
        opener: Opener,
        registry: Registry,
        nodes: Nodes,
        open_memory: Callable[[ProgramThread], int],
        image_of: Callable[[int], ProcessImage | None],
    ) -> None:
        self._opener, self._registry, self._nodes = opener, registry, nodes
        self._open_memory, self._image_of = open_memory, image_of
        self._walks = Walks(nodes.devices, self._node_of_file)

    def handlers(self) -> dict[int, Handler]:
        """Return the handlers by number of the call."""
        found: dict[int, Handler] = {
            abi.SYS_OPEN: lambda thread: self._open(thread, _of(thread), thread.regs.rsi),
            abi.SYS_OPENAT: lambda thread: self._open(thread, _at(thread), thread.regs.rdx),
            abi.SYS_OPENAT2: self._openat2,
            abi.SYS_CREAT: lambda thread: self._open(
                thread, _of(thread), abi.O_CREAT | abi.O_WRONLY | abi.O_TRUNC
            ),
            abi.SYS_STAT: lambda thread: self._stat(thread, _of(thread)),
            abi.SYS_LSTAT: lambda thread: self._stat(thread, _of(thread, follow=False)),
            abi.SYS_FSTAT: self._fstat,
            abi.SYS_NEWFSTATAT: self._newfstatat,
            abi.SYS_STATX: self._statx,
            abi.SYS_ACCESS: lambda thread: self._access(thread, _of(thread), thread.regs.rsi),
            abi.SYS_FACCESSAT: lambda thread: self._access(thread, _at(thread), thread.regs.rdx),
            abi.SYS_FACCESSAT2: lambda thread: self._access(
                thread, _at(thread, thread.regs.r10), thread.regs.rdx
            ),
            abi.SYS_READLINK: self._readlink,
            abi.SYS_READLINKAT: self._readlinkat,
            abi.SYS_CHMOD: lambda thread: self._chmod(thread, _of(thread), thread.regs.rsi),
            abi.SYS_FCHMODAT: lambda thread: self._chmod(thread, _at(thread), thread.regs.rdx),
            abi.SYS_FCHMODAT2: lambda thread: self._chmod(
                thread, _at(thread, thread.regs.r10), thread.regs.rdx
            ),
            abi.SYS_CHOWN: lambda thread: self._chown(thread, _of(thread)),
            abi.SYS_LCHOWN: lambda thread: self._chown(thread, _of(thread, follow=False)),
            abi.SYS_FCHOWNAT: self._fchownat,
            abi.SYS_STATFS: self._statfs,
            abi.SYS_UTIME: lambda thread: self._touch(thread, _of(thread), thread.regs.rsi),
            abi.SYS_UTIMES: lambda thread: self._touch(thread, _of(thread), thread.regs.rsi),
            abi.SYS_FUTIMESAT: lambda thread: self._touch(thread, _at(thread), thread.regs.rdx),
            abi.SYS_UTIMENSAT: lambda thread: self._touch(
                thread, _at(thread, thread.regs.r10), thread.regs.rdx
            ),
            abi.SYS_MKNOD: self._answer(-EEXIST, lambda thread: _of(thread, follow=False)),
            abi.SYS_MKNODAT: self._answer(
                -EEXIST, lambda thread: _at(thread, abi.AT_SYMLINK_NOFOLLOW)
            ),
        }
        for error, numbers in _ANSWERS.items():
            found |= {number: self._answer(-error, _of) for number in numbers}
        for error, numbers in _ANSWERS_OF_LINKS.items():
            found |= {
                number: self._answer(-error, lambda thread: _of(thread, follow=False))
                for number in numbers
            }
        return found

    # --- opening --------------------------------------------------------------------------------

    def _openat2(self, thread: ProgramThread) -> int | None:
        regs = thread.regs
        how = thread.image.read(regs.rdx, _HOW.size)
        if len(how) < _HOW.size or not _HOW.size <= regs.r10 <= abi.PAGE:
            return None  # the kernel says what is wrong, before it looks at the path
        flags, _mode, _resolve = _HOW.unpack(how)
        return self._open(thread, _at(thread), flags)

    def _open(self, thread: ProgramThread, place: _Place, flags: int) -> int | None:
        if flags & abi.O_NOFOLLOW or (flags & abi.O_CREAT and flags & abi.O_EXCL):
            place = place._replace(follow=False)
        node = self._node(thread, place) or self._linked_node(thread, place.path)
        if node is None:
            return self._open_process(thread, place.path, flags)
        if flags & abi.O_CREAT and flags & abi.O_EXCL:
            return -EEXIST
        if node.is_directory:
            return -EISDIR if flags & (abi.O_ACCMODE | abi.O_CREAT) else None
        if flags & abi.O_DIRECTORY:
            return -ENOTDIR
        if node.text is not None:
            return self._open_text(thread, node.text(), flags)
        return self._open_device(thread, node, flags)

    def _open_process(self, thread: ProgramThread, path: int, flags: int) -> int | None:
        """Open the memory of a process, or the list of its mappings if it has enclaves."""
        if thread.image.read(path, len(_PROC)) != _PROC:
            return None
        match = _OF_PROCESS.fullmatch(thread.image.read_string(path))
        if match is None:
            return None
        if match["what"] == b"mem":
            return self._open_memory(thread)
        pid = int(match["pid"]) if match["pid"].isdigit() else thread.process.pid
        image = self._image_of(pid)
        if image is None or not image.has_enclaves:
            return None
        try:
            lines = maps_lines(pid)
        except OSError as error:
            return -(error.errno or EACCES)
        from softsgx.engines.native.syscalls.maps import maps_text

        shown = maps_text(lines, image, self._registry, self._nodes.device(ENCLAVE))
        return self._open_text(thread, os.fsencode(shown), flags)

    def _open_text(self, thread: ProgramThread, text: bytes, flags: int) -> int:
        if flags & abi.O_ACCMODE != abi.O_RDONLY:
            return -EACCES
        descriptor = _make_file(thread, flags)
        if descriptor >= 0:
            ours = libc.take_descriptor(thread.tid, descriptor)
            try:
                os.pwrite(ours, text, 0)
                fcntl.fcntl(ours, abi.F_ADD_SEALS, _SEALED)
            finally:
                os.close(ours)
        return descriptor

    def _open_device(self, thread: ProgramThread, node: Node, flags: int) -> int:
        self._registry.sweep()
        descriptor = watch_devices(thread) or _make_file(thread, flags)
        if descriptor < 0:
            return descriptor
        memory = None
        try:
            memory = EnclaveMemory(libc.take_descriptor(thread.tid, descriptor))
            file: EnclaveFile | ProvisionFile
            if node.name == ENCLAVE:
                file = self._opener.open_enclave(thread)
            else:
                file = self._opener.open_provision(thread)
        except OSError as error:
            if memory is not None:
                memory.close()
            thread.syscall(abi.SYS_CLOSE, descriptor)
            return -(error.errno or EACCES)
        self._registry.add(Device(file, memory, flags & abi.O_ACCMODE))
        return descriptor

    # --- inspecting -----------------------------------------------------------------------------

    def _stat(self, thread: ProgramThread, place: _Place) -> int | None:
        node = self._own_node(thread, place)
        return None if node is None else _give(thread, thread.regs.rsi, node.stat())

    def _fstat(self, thread: ProgramThread) -> int | None:
        node = self._descriptor_node(thread, thread.regs.rdi)
        return None if node is None else _give(thread, thread.regs.rsi, node.stat())

    def _newfstatat(self, thread: ProgramThread) -> int | None:
        regs = thread.regs
        node = self._node_at(thread, regs.r10)
        return None if node is None else _give(thread, regs.rdx, node.stat())

    def _statx(self, thread: ProgramThread) -> int | None:
        regs = thread.regs
        node = self._node_at(thread, regs.rdx)
        return None if node is None else _give(thread, regs.r8, node.statx())

    def _access(self, thread: ProgramThread, place: _Place, mode: int) -> int | None:
        node = self._own_node(thread, place)
        if node is None:
            return None
        everybody = node.mode & 7
        return -EACCES if mode & 7 & ~everybody else 0

    def _readlink(self, thread: ProgramThread) -> int | None:
        regs = thread.regs
        return self._read_link(thread, _of(thread, follow=False), regs.rsi, regs.rdx)

    def _readlinkat(self, thread: ProgramThread) -> int | None:
        regs = thread.regs
        place = _at(thread, abi.AT_SYMLINK_NOFOLLOW)
        return self._read_link(thread, place, regs.rdx, regs.r10)

    def _read_link(
        self, thread: ProgramThread, place: _Place, buffer: int, size: int
    ) -> int | None:
        if self._own_node(thread, place) is not None:
            return -EINVAL
        node = self._linked_node(thread, place.path)
        if node is None:
            return None
        given = _give(thread, buffer, node.name[:size])
        return given or min(size, len(node.name))

    def _statfs(self, thread: ProgramThread) -> int | None:
        """Answer for the file system of ``/dev``, where the nodes would be."""
        if self._own_node(thread, _of(thread)) is None:
            return None
        image = thread.image
        scratch = image.vdso_base + image.vdso.scratch
        os.pwrite(image.memory_fd, b"/dev\0", scratch)
        return thread.finish_syscall(abi.SYS_STATFS, scratch, thread.regs.rsi)

    # --- changing -------------------------------------------------------------------------------

    def _chmod(self, thread: ProgramThread, place: _Place, mode: int) -> int | None:
        node = self._own_node(thread, place)
        if node is None:
            return None
        if not _owns(thread, node):
            return -EPERM
        node.mode = stat.S_IFMT(node.mode) | mode & _PERMISSIONS
        return 0

    def _chown(self, thread: ProgramThread, place: _Place) -> int | None:
        return self._change_owner(thread, place, thread.regs.rsi, thread.regs.rdx)

    def _fchownat(self, thread: ProgramThread) -> int | None:
        regs = thread.regs
        return self._change_owner(thread, _at(thread, regs.r8), regs.rdx, regs.r10)

    def _change_owner(self, thread: ProgramThread, place: _Place, uid: int, gid: int) -> int | None:
        node = self._own_node(thread, place)
        if node is None:
            return None
        uid, gid = uid & _UNCHANGED, gid & _UNCHANGED
        if _effective_uid(thread) and (uid, gid) != (_UNCHANGED, _UNCHANGED):
            return -EPERM
        node.uid = node.uid if uid == _UNCHANGED else uid
        node.gid = node.gid if gid == _UNCHANGED else gid
        return 0

    def _touch(self, thread: ProgramThread, place: _Place, times: int) -> int | None:
        """Set a node's times, which are not kept: it exists for this run only."""
        node = self._own_node(thread, place)
        if node is None:
            return None
        return 0 if not times or _owns(thread, node) else -EPERM

    def _answer(self, result: int, place_of: Callable[[ProgramThread], _Place]) -> Handler:
        def answer(thread: ProgramThread) -> int | None:
            node = self._own_node(thread, place_of(thread))
            return None if node is None else result

        return answer

    # --- which node -----------------------------------------------------------------------------

    def _node(self, thread: ProgramThread, place: _Place) -> Node | None:
        """Return the node that a path in the program's memory names."""
        path = thread.image.read_string(place.path)
        if self._nodes.may_name(path[:8]):
            node = self._nodes.find(path)
            if node is not None:
                return node
        return self._walks.find(
            thread, place.directory, path, follow=place.follow, opened=bool(len(self._registry))
        )

    def _own_node(self, thread: ProgramThread, place: _Place) -> Node | None:
        """Return the node that a path names, if no real file answers for it."""
        node = self._node(thread, place)
        return None if node is None or node.shadows else node

    def _node_at(self, thread: ProgramThread, flags: int) -> Node | None:
        place = _at(thread, flags)
        node = self._own_node(thread, place)
        if node is None and flags & abi.AT_EMPTY_PATH and not thread.image.read_string(place.path):
            node = self._descriptor_node(thread, place.directory)
        return node

    def _descriptor_node(self, thread: ProgramThread, descriptor: int) -> Node | None:
        device = self._registry.of_descriptor(thread.tid, descriptor & 0xFFFF_FFFF)
        return None if device is None else self._node_of(device)

    def _linked_node(self, thread: ProgramThread, path: int) -> Node | None:
        """Return the device whose descriptor's link in /proc a path names.

        Opening such a link opens the device again.
        """
        if not len(self._registry):
            return None
        link = _LINK.fullmatch(thread.image.read_string(path))
        if link is None:
            return None
        itself = thread.tid if link[1] == b"thread-self" else thread.process.pid
        owner = int(link[1]) if link[1] and link[1].isdigit() else itself
        device = self._registry.of_descriptor(owner, int(link[2]))
        return None if device is None else self._node_of(device)

    def _node_of_file(self, key: tuple[int, int]) -> Node | None:
        device = self._registry.of_inode(key)
        return None if device is None else self._node_of(device)

    def _node_of(self, device: Device) -> Node:
        is_enclave = isinstance(device.file, EnclaveFile)
        return self._nodes.device(ENCLAVE if is_enclave else PROVISION)


#: Calls whose first argument is a path, by what they end with at a node.
_ANSWERS = {
    ENODATA: (abi.SYS_GETXATTR,),
    0: (abi.SYS_LISTXATTR,),
    EPERM: (abi.SYS_SETXATTR, abi.SYS_REMOVEXATTR),
    EINVAL: (abi.SYS_TRUNCATE,),
}
_ANSWERS_OF_LINKS = {
    ENODATA: (abi.SYS_LGETXATTR,),
    0: (abi.SYS_LLISTXATTR,),
    EPERM: (abi.SYS_LSETXATTR, abi.SYS_LREMOVEXATTR),
}


def _of(thread: ProgramThread, *, follow: bool = True) -> _Place:
    """Return the path of a call whose first argument it is."""
    return _Place(abi.AT_FDCWD, thread.regs.rdi, follow)


def _at(thread: ProgramThread, flags: int = 0) -> _Place:
    """Return the path of a call whose first arguments are a directory and a path."""
    return _Place(thread.regs.rdi, thread.regs.rsi, not flags & abi.AT_SYMLINK_NOFOLLOW)


def _make_file(thread: ProgramThread, flags: int) -> int:
    """Make a memory file in the program that can be sealed; return its descriptor."""
    return thread.finish_syscall(
        abi.SYS_MEMFD_CREATE,
        thread.image.vdso_base + thread.image.vdso.device_name,
        abi.MFD_ALLOW_SEALING | (abi.MFD_CLOEXEC if flags & abi.O_CLOEXEC else 0),
    )


def _owns(thread: ProgramThread, node: Node) -> bool:
    return _effective_uid(thread) in (0, node.uid)


def _effective_uid(thread: ProgramThread) -> int:
    """Return its effective user id, as this process sees ids."""
    with open(f"/proc/{thread.tid}/status") as status:
        for line in status:
            if line.startswith("Uid:"):
                return int(line.split()[2])
    raise AssertionError("a thread without a user")


def _give(thread: ProgramThread, buffer: int, data: bytes) -> int:
    try:
        libc.write_memory(thread.tid, buffer, data)
    except OSError:
        return -EFAULT
    return 0
