"""Imported by each interpreter that starts with this directory in its path; see the package."""

from __future__ import annotations

import os
import sys

if any("softsgx" in word for word in sys.orig_argv):
    from tests.support.modes import VARIABLE, apply

    apply(os.environ[VARIABLE])
