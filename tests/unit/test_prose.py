"""Prose names the actor: comments, docstrings, messages and pages are free of vague words.

Goal: a reader with the manual and the kernel's sources open does not have to guess who acts.
Method: search comments and strings of Python files, and whole files of other kinds, for words that
CONTRIBUTING.md advises against.
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Words, and what to write instead.
VAGUE = {
    r"(who|what)(so)?ever (touch|need|want|call|ask)\w*|whomever|whoever": "name the actor",
    r"nobody|somebody|everybody": "name the task, thread, process or user",
    r"mistakes? of ours|of ours": "a bug of softsgx; or name the component",
    r"goes on|go on": "continues, resumes",
    r"in vain": "without effect",
    r"worse": "degraded, slower",
    r"(is|are|was|were) told": "receives, is reported",
    r"(is|are) owed|deferred motion": "is deferred",
    r"it lives (in|on|at)|as long as it lives": "is stored in, exists",
}
_VAGUE = re.compile("|".join(rf"\b(?:{words})\b" for words in VAGUE), re.IGNORECASE)
_PLACES = ("src", "docs", "tools", "benchmarks", "examples", "plugins", "README.md")
_KINDS = frozenset({".py", ".md", ".c", ".h"})
_PROSE = frozenset({tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)})


def files() -> list[Path]:
    found = [path for place in _PLACES for path in ([ROOT / place, *(ROOT / place).rglob("*")])]
    return sorted(
        path
        for path in found
        if path.suffix in _KINDS and path.is_file() and "_build" not in path.parts
    )


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of comments and strings, or all lines, each with its number."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        return
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in _PROSE:
                yield from enumerate(token.string.splitlines(), token.start[0])


def vague(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {found[0]!r}"
        for number, line in prose(path)
        if (found := _VAGUE.search(line)) is not None
    ]


def test_no_file_has_vague_words() -> None:
    found = [line for path in files() for line in vague(path)]
    assert not found, "name the actor instead; see VAGUE:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    ["# whoever comes", '"""Nobody waits."""', 'x = "a mistake of ours"', "# the thread goes on"],
)
def test_a_vague_word_is_found(tmp_path: Path, text: str) -> None:
    file = tmp_path / "one.py"
    file.write_text(text + "\n")
    assert [_VAGUE.search(line) for _number, line in prose(file)] != [None]


def test_code_is_no_prose(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text("worse = whoever\n")
    assert list(prose(file)) == []
