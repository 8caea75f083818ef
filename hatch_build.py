"""The build hook: compiles ``softsgx._speedups`` for a wheel or an editable install, if it can.

Where no compiler works, the package is built without the extension, and one line says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import speedups  # noqa: E402 - it is where the package is not installed yet


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """See the module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; name the file as one of the wheel's, and the interpreters that can load it."""
        try:
            built = speedups.build()
        except speedups.NotBuilt as error:
            self.app.display_warning(f"softsgx: compiled core: not built: {error}")
            return
        build_data["artifacts"].append(f"/{built.relative_to(ROOT)}")
        build_data["pure_python"] = False
        build_data["tag"] = speedups.tag()
