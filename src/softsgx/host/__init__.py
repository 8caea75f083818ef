"""Assembly: a machine, the core, groups and the driver, from one configuration object."""

from softsgx.host.config import MIN_EPC_PAGES, PROFILES, PlatformConfig, parse_size
from softsgx.host.guest import GuestPlatform
from softsgx.host.platform import Platform

__all__ = ["MIN_EPC_PAGES", "PROFILES", "GuestPlatform", "Platform", "PlatformConfig", "parse_size"]
