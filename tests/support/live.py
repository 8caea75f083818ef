"""``softsgx top`` in a pseudo-terminal and in pipes, and a directory for the sockets of runs."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["ALTERNATE_OFF", "ALTERNATE_ON", "SOFTSGX", "Terminal", "runtime_directory", "top"]

SOFTSGX = [sys.executable, "-m", "softsgx"]
ALTERNATE_ON, ALTERNATE_OFF = b"\x1b[?1049h", b"\x1b[?1049l"
_SEQUENCE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@contextmanager
def runtime_directory() -> Iterator[Path]:
    """Yield what XDG_RUNTIME_DIR can name: paths of sockets have 107 bytes at most."""
    with TemporaryDirectory(prefix="softsgx-test-", dir="/tmp") as path:
        yield Path(path)


def top(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SOFTSGX, "top", *arguments], capture_output=True, text=True, check=False, env=env
    )


class Terminal:
    """``softsgx top`` in a pseudo-terminal of so many columns."""

    def __init__(self, *arguments: str, env: dict[str, str], columns: int = 80) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            [*SOFTSGX, "top", "--interval", "0.05", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.slave, self.seen = slave, b""

    def until(self, text: bytes) -> bytes:
        """Read until it has been drawn; return it all without control sequences."""
        while text not in self.seen:
            self.seen += os.read(self.master, 1 << 16)
        return _SEQUENCE.sub(b"", self.seen)

    def end(self) -> int:
        """Wait for its end; return the status, when the terminal is as it was."""
        status = self.process.wait()
        assert termios.tcgetattr(self.slave) == self.before
        os.close(self.slave)
        try:
            while part := os.read(self.master, 1 << 16):
                self.seen += part
        except OSError:  # the other end is closed
            pass
        os.close(self.master)
        assert self.seen.count(ALTERNATE_ON) == self.seen.count(ALTERNATE_OFF) == 1
        return status
