"""numba, which an extra installs; and the directory of its compiled code.

Kernels are functions of arrays and integers.  numba compiles each at its first call, which takes
seconds, and caches it in the user's cache directory, since a system-wide install is not writable.
Without a writable directory, each process compiles them again.

Source:
    XDG Base Directory Specification; numba, "Caching", ``NUMBA_CACHE_DIR``.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from softsgx.errors import SoftSgxError

try:
    import numba
    from numba.core import types
    from numba.extending import intrinsic
except ImportError as error:
    raise SoftSgxError(
        f"plan: package {error.name} is missing; pip install 'softsgx[plan]'"
    ) from error

__all__ = ["cache_directory", "compiled", "is_cached", "popcount"]

F = TypeVar("F", bound=Callable[..., Any])
_config: Any = numba.config


def cache_directory() -> Path:
    """Return the directory of compiled kernels: in ``NUMBA_CACHE_DIR`` or one of the user's.

    Kernels of other sources have another one: numba compares the time of a kernel's own file, and
    misses a change in a kernel or a constant that it uses from another file.
    """
    return _base_directory() / _digest_of_sources()


def _base_directory() -> Path:
    if _config.CACHE_DIR:
        return Path(_config.CACHE_DIR)
    # The specification says that a relative path must be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path(os.path.expanduser("~")) / ".cache"
    return base / "softsgx" / "numba"


@functools.cache
def _digest_of_sources() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def is_cached(kernel: Callable[..., Any]) -> bool:
    """Return whether a kernel is compiled: for this process, or in the cache."""
    dispatcher: Any = kernel
    name = dispatcher.py_func.__qualname__
    return bool(dispatcher.signatures) or any(cache_directory().rglob(f"*.{name}-*.nbc"))


def compiled(kernel: F, *, inlined: bool = False, counts_references: bool = True) -> F:
    """Decorate a kernel, which releases the GIL.

    Args:
        kernel: the function.
        inlined: compile it into its callers: a call passes each array as seven numbers.
        counts_references: ``False`` for a kernel that allocates nothing, and whose arrays the
            caller keeps: a call with many arrays then takes a fifth of the time.
    """
    # Not in the signature: numba's runtime counts references.
    options: dict[str, Any] = {
        "nogil": True,
        "forceinline": inlined,
        "_nrt": counts_references,
    }
    configured = _config.CACHE_DIR
    _config.CACHE_DIR = str(cache_directory())  # numba.njit reads it
    try:
        made: F = numba.njit(kernel, cache=True, **options)
    except RuntimeError:  # no directory that can be written
        made = numba.njit(kernel, **options)
    finally:
        _config.CACHE_DIR = configured
    return made


def _popcount(_: Any, word: Any) -> Any:
    """Return how many bits of a 64-bit word are set."""

    def instruction(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), instruction


popcount: Any = intrinsic(_popcount)
"""How many bits of a 64-bit word are set; kernels can call it."""
