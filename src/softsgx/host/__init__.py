"""Assembly: a machine, the core, groups and the driver, from one configuration object."""

from typing import TYPE_CHECKING

from softsgx.host.config import (
    PROFILES,
    PlatformConfig,
    check_group_path,
    least_bytes,
    limit_option,
)
from softsgx.host.platform import Platform
from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.host.guest import GuestPlatform

__all__ = [
    "PROFILES",
    "GuestPlatform",
    "Platform",
    "PlatformConfig",
    "check_group_path",
    "least_bytes",
    "limit_option",
]

__getattr__ = on_demand(
    __name__,
    {
        "guest": ("GuestPlatform",),
    },
)
