"""Which node a path leads to when it is walked as the kernel walks it.

The nodes are in no file system.  A walk goes from directory to directory, as descriptors of this
process, from the program's root or working directory.  It follows symbolic links, and ends at a
name in the program's ``/dev`` that only a node has.  The kernel follows links in ``/proc`` that
lead to a descriptor of the program; so a path may also end at the memory file of an open device.

Only these paths are walked: those whose last name is one of a node, symbolic links that lead to no
file, and links to descriptors.

Deviation: a walk passes directories that this process may search, and the program may not.

Deviation: links count towards ELOOP only where the walk itself follows them.

Source:
    path_resolution(7), symlink(7), proc_pid_fd(5), proc_pid_root(5), proc_pid_cwd(5).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping

from softsgx.engines.native import abi
from softsgx.engines.native.syscalls.nodes import Node
from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["Walks"]

_DEV = b"/dev"
_MOST_LINKS = 40
_HERE, _UP = (b"", b"."), b".."
_OPEN = os.O_PATH | os.O_CLOEXEC
#: Links that lead to descriptors: in /proc, and in /dev for those of /proc/self.
_DESCRIPTORS = (b"fd/", b"/dev/std")
_DIRECTORIES = (b"self/root/", b"self/cwd/")
#: Links of /proc that lead each process somewhere else.
_OF_READER = {b"self": "{pid}", b"thread-self": "{pid}/task/{tid}"}


class Walks:
    """See the module.

    Args:
        nodes: the devices' nodes and their directory, by absolute path.
        open_device: returns the node of the open device with this file, by (device, inode).
    """

    def __init__(
        self,
        nodes: Mapping[bytes, Node],
        open_device: Callable[[tuple[int, int]], Node | None],
    ) -> None:
        self._nodes, self._open_device = nodes, open_device
        self._last = frozenset(name.rpartition(b"/")[2] for name in nodes)
        # What the kernel finds at a node's name on a machine that has SGX.
        self._real = {
            info.st_rdev for info in map(_stat, nodes) if info and stat.S_ISCHR(info.st_mode)
        }

    def find(
        self, thread: ProgramThread, directory: int, path: bytes, *, follow: bool, opened: bool
    ) -> Node | None:
        """Return the node at the end of a path, ``None`` if the kernel finds the end by itself.

        Args:
            thread: whose path it is.
            directory: the descriptor from which a relative path starts, or AT_FDCWD.
            path: as the thread has given it.
            follow: whether the call follows a symbolic link at the end.
            opened: whether a device is open somewhere, so that links in /proc may lead to it.
        """
        place = _place(thread.tid, directory, path)
        if not self._may_lead(place, path, follow=follow, opened=opened):
            return None
        try:
            with _Walk(thread, place) as walk:
                return self._walked(walk, path, follow=follow)
        except OSError:
            return None  # the kernel fails in the same place, and tells why

    def _may_lead(self, place: bytes, path: bytes, *, follow: bool, opened: bool) -> bool:
        if path.rstrip(b"/").rpartition(b"/")[2] in self._last:
            return True
        if not follow or not path:
            return False
        if opened and (path.isdigit() or any(each in path for each in _DESCRIPTORS)):
            return True
        if any(each in path for each in _DIRECTORIES):
            return True  # of /proc/self, which is another process here
        whole = place + b"/" + path
        try:
            os.readlink(whole)
        except OSError:
            return False  # most paths lead here
        info = _stat(whole)
        return info is None or (stat.S_ISCHR(info.st_mode) and info.st_rdev in self._real)

    def _walked(self, walk: _Walk, path: bytes, *, follow: bool) -> Node | None:
        nodes, names, links = self._nodes, path.split(b"/"), 0
        while names:
            name = names.pop(0)
            if name in _HERE:
                continue
            at = _DEV + b"/" + name
            if at in nodes and walk.is_at(_DEV):
                # What follows is in a directory that no file system has.
                while names and nodes[at].is_directory and names[0] != _UP:
                    name = names.pop(0)
                    at = at if name in _HERE else at + b"/" + name
                    if at not in nodes:
                        return None
                if not names:
                    return nodes[at]
                if not nodes[at].is_directory:
                    return None  # a device, and a slash or more behind it
                names.pop(0)  # back in /dev
                continue
            target = walk.enter(name, follow=follow or bool(names))
            if target is None:
                continue
            links += 1
            if links > _MOST_LINKS:
                return None
            if target.startswith(b"/"):
                walk.to_root()
            names[:0] = target.split(b"/")
        return self._open_device(walk.key)


class _Walk:
    """A directory, or at the end another file, that a walk has come to.

    Args:
        thread: whose root and directories they are.
        start: where it begins: a path of this process.
    """

    def __init__(self, thread: ProgramThread, start: bytes) -> None:
        self._tid, self._pid = thread.tid, thread.process.pid
        self._root = _open(b"/proc/%d/root" % self._tid)
        try:
            self._at = _open(start)
        except OSError:
            os.close(self._root)
            raise

    def __enter__(self) -> _Walk:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._at)
        os.close(self._root)

    @property
    def key(self) -> tuple[int, int]:
        """The (device, inode) of where it is."""
        return _key(self._at)

    def is_at(self, path: bytes) -> bool:
        """Return whether it is at an absolute path of the program, which has no links."""
        info = _stat(path.lstrip(b"/"), self._root)
        return info is not None and (info.st_dev, info.st_ino) == self.key

    def to_root(self) -> None:
        """Go to the program's root."""
        self._go(os.dup(self._root))

    def enter(self, name: bytes, *, follow: bool) -> bytes | None:
        """Go to a file in this directory; return the target if it is a link, and stay."""
        if name == _UP:
            if self.key != _key(self._root):
                self._go(_open(_UP, self._at))
            return None
        if name in _OF_READER and _is_proc(self._at):
            return os.fsencode(_OF_READER[name].format(pid=self._pid, tid=self._tid))
        found = _open(name, self._at, os.O_NOFOLLOW)
        if follow and stat.S_ISLNK(os.fstat(found).st_mode):
            try:
                if not _is_proc(self._at):
                    return os.readlink(b"", dir_fd=found)
            finally:
                os.close(found)
            found = _open(name, self._at)  # a link of /proc leads to a file, not to a path
        self._go(found)
        return None

    def _go(self, descriptor: int) -> None:
        os.close(self._at)
        self._at = descriptor


def _place(tid: int, directory: int, path: bytes) -> bytes:
    if path.startswith(b"/"):
        return b"/proc/%d/root" % tid
    if directory & 0xFFFF_FFFF == abi.AT_FDCWD:
        return b"/proc/%d/cwd" % tid
    return b"/proc/%d/fd/%d" % (tid, directory & 0xFFFF_FFFF)


def _open(path: bytes, directory: int | None = None, flags: int = 0) -> int:
    return os.open(path, _OPEN | flags, dir_fd=directory)


def _stat(path: bytes, directory: int | None = None) -> os.stat_result | None:
    try:
        return os.stat(path, dir_fd=directory)
    except OSError:
        return None


def _key(descriptor: int) -> tuple[int, int]:
    info = os.fstat(descriptor)
    return info.st_dev, info.st_ino


def _is_proc(descriptor: int) -> bool:
    return os.fstat(descriptor).st_dev == os.stat("/proc").st_dev
