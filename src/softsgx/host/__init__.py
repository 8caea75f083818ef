"""Assembly: a machine, the core, groups and the driver, from one configuration object."""

from softsgx.host.config import (
    PROFILES,
    PlatformConfig,
    check_group_path,
    least_bytes,
    limit_option,
)
from softsgx.host.guest import GuestPlatform
from softsgx.host.platform import Platform

__all__ = [
    "PROFILES",
    "GuestPlatform",
    "Platform",
    "PlatformConfig",
    "check_group_path",
    "least_bytes",
    "limit_option",
]
