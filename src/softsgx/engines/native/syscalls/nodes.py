"""Names that exist for the program only: device nodes, their directory, and files of text.

Source:
    stat(2), statx(2); udev's rules for SGX devices; Documentation/admin-guide/cgroup-v2.rst for the
    files of groups.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable

from softsgx import cgroup
from softsgx.cgroup import Hierarchy
from softsgx.ondemand import dataclass, field

__all__ = ["CGROUP", "ENCLAVE", "PROVISION", "Node", "Nodes", "devices"]

CGROUP = b"/sys/fs/cgroup/softsgx"
"""Where the program finds the files of groups."""

ENCLAVE, PROVISION = b"/dev/sgx_enclave", b"/dev/sgx_provision"
_DIRECTORY = b"/dev/sgx"
_CPUINFO = b"/proc/cpuinfo"
_MISC_MAJOR = 10
_MINORS = {ENCLAVE: 125, PROVISION: 126}
_PREFIX_BYTES = 8
_PREFIXES = frozenset(name[:_PREFIX_BYTES] for name in (_DIRECTORY, CGROUP, _CPUINFO))

_STAT = struct.Struct("<QQQIIIIQqqqQQQQQQ24x")
_STATX = struct.Struct("<IIQIIIH2xQQQQ64xIIIIQ104x")
_STATX_BASIC = 0x7FF


@dataclass(eq=False, slots=True)
class Node:
    """One name; what chmod, chown and utime change is kept for the run.

    Attributes:
        name: an absolute path, the usual one where a node has several.
        mode: kind and permissions, as in ``st_mode``.
        uid, gid: its owner, as the program sees ids.
        minor: of a device.
        text: returns what a file holds at the moment; ``None`` where opening is not reading.
        shadows: whether the real file provides everything except its text.
    """

    name: bytes
    mode: int
    minor: int = 0
    text: Callable[[], bytes] | None = None
    shadows: bool = False
    uid: int = 0
    gid: int = 0
    mtime_s: int = field(default_factory=lambda: int(os.stat("/dev").st_mtime))

    @property
    def is_device(self) -> bool:
        """Whether it is a character device."""
        return stat.S_ISCHR(self.mode)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    def stat(self) -> bytes:
        """Return ``struct stat``."""
        info = os.stat("/dev")
        device = os.makedev(_MISC_MAJOR, self.minor) if self.is_device else 0
        links = 2 if self.is_directory else 1
        times = (self.mtime_s, 0) * 3
        return _STAT.pack(
            *(info.st_dev, self.inode, links, self.mode, self.uid, self.gid, 0),
            *(device, 0, 4096, 0, *times),
        )

    def statx(self) -> bytes:
        """Return ``struct statx``."""
        info = os.stat("/dev")
        major, minor = os.major(info.st_dev), os.minor(info.st_dev)
        links = 2 if self.is_directory else 1
        return _STATX.pack(
            *(_STATX_BASIC, 4096, 0, links, self.uid, self.gid, self.mode, self.inode, 0, 0, 0),
            *(_MISC_MAJOR if self.is_device else 0, self.minor, major, minor, 0),
        )

    @property
    def inode(self) -> int:
        """Its number in the file system."""
        return self.minor or 1 << 32 | hash(self.name) & 0xFFFF_FFFF


def devices() -> dict[bytes, Node]:
    """Return the device nodes and their directory, by each of their names."""
    mode = stat.S_IFCHR | 0o666
    enclave, provision = (Node(name, mode, minor) for name, minor in _MINORS.items())
    return {
        ENCLAVE: enclave,
        _DIRECTORY + b"/enclave": enclave,
        PROVISION: provision,
        _DIRECTORY + b"/provision": provision,
        _DIRECTORY: Node(_DIRECTORY, stat.S_IFDIR | 0o755),
    }


class Nodes:
    """All such names.

    Args:
        groups: whose files are below :data:`CGROUP`.
        cpuinfo: returns the text of ``/proc/cpuinfo``.

    Attributes:
        devices: the device nodes and their directory, by each of their names.
    """

    def __init__(self, groups: Hierarchy, cpuinfo: Callable[[], bytes]) -> None:
        self._groups = groups
        self.devices = devices()
        shadow = Node(_CPUINFO, stat.S_IFREG | 0o444, text=cpuinfo, shadows=True)
        self._known = {**self.devices, _CPUINFO: shadow}

    def may_name(self, start: bytes) -> bool:
        """Return whether a path that starts with these eight bytes may be a node."""
        return start in _PREFIXES

    def device(self, name: bytes) -> Node:
        """Return a device's node by its usual name."""
        return self._known[name]

    def find(self, path: bytes) -> Node | None:
        """Return the node at an absolute path, ``None`` also if only a walk can tell."""
        name = os.path.normpath(path)
        if name in self.devices and b"/.." in path:
            return None  # behind a device it is an error
        node = self._known.get(name)
        if node is None and name.startswith(CGROUP):
            node = self._group_node(name)
        if node is not None and path.endswith(b"/") and not node.is_directory:
            return None
        return node

    def _group_node(self, name: bytes) -> Node | None:
        below = name.removeprefix(CGROUP).decode(errors="surrogateescape")
        directory, _slash, last = below.rpartition("/")
        try:
            if last.startswith("misc."):
                group = self._groups.find(directory)
                if last not in cgroup.file_names(group):
                    return None
                return Node(
                    name, stat.S_IFREG | 0o444, text=lambda: cgroup.read_file(group, last).encode()
                )
            self._groups.find(below)
        except OSError:
            return None
        return Node(name, stat.S_IFDIR | 0o755)
