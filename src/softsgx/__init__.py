"""SGX without the hardware, from the page cache up.

softsgx is a software machine with a finite, encrypted Enclave Page Cache (EPC), and the
operating-system half that swaps it.  It is an emulation: it protects nothing from the owner of the
machine it runs on.

Everyday use starts with :class:`Platform`::

    import softsgx

    with softsgx.Platform(epc="16MiB") as platform:
        process = platform.process()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = ["Platform", "PlatformConfig", "__version__"]

if TYPE_CHECKING:
    from softsgx.host import Platform, PlatformConfig


def __getattr__(name: str) -> object:
    """Import what everyday use needs only when it is used."""
    if name in ("Platform", "PlatformConfig"):
        from softsgx import host

        return getattr(host, name)
    raise AttributeError(f"module 'softsgx' has no attribute {name!r}")
