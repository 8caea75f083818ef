"""Files that a command writes at its end, which may be much later than its start.

They are opened at the start, so that a file that cannot be written is refused at once.  A file that
was created and not written is removed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from softsgx.errors import SoftSgxError

__all__ = ["Outputs"]


class Outputs:
    """See the module; a context manager.

    Args:
        paths: the files; each once.
        force: whether existing files may be overwritten.

    Raises:
        SoftSgxError: one of them cannot be written; no file has been changed.
    """

    def __init__(self, paths: Iterable[str], *, force: bool) -> None:
        self._opened: dict[str, int] = {}
        self._made: set[str] = set()
        self._known: set[tuple[int, int]] = set()
        try:
            for path in paths:
                self._open(path, force=force)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def write(self, path: str, data: bytes) -> None:
        """Write one of the files.

        Raises:
            SoftSgxError: it cannot be written completely.
        """
        try:
            with open(self._opened.pop(path), "wb") as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    file.truncate(0)
                file.write(data)
        except OSError as error:
            raise SoftSgxError(f"{path}: {error.strerror or error}; it is not complete") from error
        self.keep(path)

    def keep(self, *paths: str | None) -> None:
        """Keep files that other code has written."""
        self._made.difference_update(paths)

    def close(self) -> None:
        """Remove files that were created and not written."""
        for descriptor in self._opened.values():
            os.close(descriptor)
        for path in self._made:
            os.unlink(path)
        self._opened.clear()
        self._made.clear()

    def _open(self, path: str, *, force: bool) -> None:
        try:
            self._refuse(path, os.stat(path), force=force)
            flags, made = os.O_WRONLY, False
        except FileNotFoundError:
            flags, made = os.O_WRONLY | os.O_CREAT | os.O_EXCL, True
        except (OSError, ValueError) as error:
            raise _unwritable(path, error) from error
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(path, error) from error
        self._opened[path] = descriptor
        if made:
            self._made.add(path)
        self._known.add(_identity(os.fstat(descriptor)))

    def _refuse(self, path: str, found: os.stat_result, *, force: bool) -> None:
        if _identity(found) in self._known and stat.S_ISREG(found.st_mode):
            raise SoftSgxError(f"{path}: given twice; choose another file")
        if stat.S_ISDIR(found.st_mode):
            raise SoftSgxError(f"{path}: is a directory; choose a file")
        if not force:
            raise SoftSgxError(f"{path}: exists; add --force to overwrite it")


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _unwritable(path: str, error: OSError | ValueError) -> SoftSgxError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SoftSgxError(f"{path}: cannot be written ({reason}); choose another file")
