"""``constraints.txt`` can be installed with the oldest Python that the package supports."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OLDEST = "3.11.0"


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if re.match(r"[\w.-]+==", line)]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_pin_can_be_installed_with_the_oldest_python() -> None:
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(OLDEST)
    refusing = {}
    for name in pins():
        try:
            python = str(metadata(name).json.get("requires_python", ""))
        except PackageNotFoundError:
            continue
        if not SpecifierSet(python).contains(OLDEST):
            refusing[name] = python
    assert not refusing


def test_what_only_tests_import_is_no_dependency_of_the_package() -> None:
    texts = [*PROJECT["project"]["dependencies"]]
    texts += [
        text for extra in PROJECT["project"]["optional-dependencies"].values() for text in extra
    ]
    assert not {Requirement(text).name for text in texts} & {"capstone", "pyelftools", "hypothesis"}
