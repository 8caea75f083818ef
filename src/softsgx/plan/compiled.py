"""numba, which an extra installs; and the directory of its compiled code.

Kernels are functions of arrays and integers.  numba compiles each at its first call, which takes
seconds, and caches it in the user's cache directory, since a system-wide install is not writable.
Without a writable directory, each process compiles them again.

Source:
    XDG Base Directory Specification; numba, "Caching", ``NUMBA_CACHE_DIR``.
"""

from __future__ import annotations

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

__all__ = ["cache_directory", "compiled", "popcount"]

F = TypeVar("F", bound=Callable[..., Any])
_config: Any = numba.config


def cache_directory() -> Path:
    """Return the directory of compiled kernels: ``NUMBA_CACHE_DIR`` or one of the user's."""
    if _config.CACHE_DIR:
        return Path(_config.CACHE_DIR)
    # The specification says that a relative path must be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path(os.path.expanduser("~")) / ".cache"
    return base / "softsgx" / "numba"


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
