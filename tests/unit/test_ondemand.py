"""Packages whose names are imported on demand, and what a run therefore does not import.

Method: a fresh interpreter for what is imported; the packages' own source for what they declare.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

LAZY = ("engines.native.gdb", "kvm", "live", "report", "runtime", "userland")
#: What only other verbs, other engines, or options of ``run`` need.
NOT_FOR_A_RUN = (
    "rich",
    "softsgx.engines.native.gdb.loop",
    "softsgx.image",
    "softsgx.kvm.device",
    "softsgx.kvm.guest",
    "softsgx.live.runs",
    "softsgx.report.html",
    "softsgx.report.perfetto",
    "softsgx.report.tables",
    "softsgx.runtime.exploration",
    "softsgx.runtime.seeded",
    "softsgx.runtime.threads",
    "softsgx.sim",
    "softsgx.userland.process",
)


def test_the_run_command_imports_nothing_that_a_run_does_not_need() -> None:
    code = "import sys, softsgx.cli.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "softsgx.engines.native.supervisor" in done.stdout.split()
    assert not set(NOT_FOR_A_RUN) & set(done.stdout.split())


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_and_the_interpreter_see_the_same_names(package: str) -> None:
    module = import_module(f"softsgx.{package}")
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    declared = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared
    for name, home in declared.items():
        assert home is not None
        assert getattr(module, name) is getattr(import_module(home), name)
        assert home.rpartition(".")[2] not in module.__all__, "a module hides a name"
    assert all(hasattr(module, name) for name in module.__all__)


def test_a_name_that_no_module_has_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"softsgx\.kvm.*'Nothing'"):
        import_module("softsgx.kvm").Nothing  # noqa: B018
