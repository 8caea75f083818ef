"""Pages of the documentation as programs: their blocks of commands, code and files.

A fenced block is a command (``console``, ``sh``), a script (``python``), or a file when the
directive ``code-block`` gives it a caption.  A comment on the line above a block says why it is not
run: ``<!-- not run: needs Docker -->``, or ``% not run: …`` as MyST has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RUNNABLE", "Block", "Command", "blocks", "commands", "shape"]

RUNNABLE = frozenset({"console", "sh", "bash", "shell", "python"})
_FENCE = re.compile(r"(?P<fence>`{3,}|:{3,})(?:\{(?P<directive>[a-z-]+)\})? ?(?P<info>.*)")
_NOT_RUN = re.compile(r"(?:<!--|%) not run: (?P<why>.+?)(?: -->)?")
_CAPTION = re.compile(r":caption: (?P<name>.+)")
_NUMBER = re.compile(r"\b0x[0-9a-f]+|\b[0-9a-f]{16,}\b|\d[\d,.]*(?:\s?(?:[KMG]i?B?|[mµn]?s)\b)?")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the file it stands in.
        line: the line of its fence, from 1.
        language: of its content, ``""`` when it has none.
        caption: the name of the file that it shows, else ``""``.
        text: what is in it.
        not_run: why no test runs it, else ``""``.
    """

    page: Path
    line: int
    language: str
    caption: str
    text: str
    not_run: str

    @property
    def where(self) -> str:
        """``page:line``, for messages."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a shell, and the lines that the page shows below it."""

    text: str
    output: tuple[str, ...]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of commands, code and files of a page."""
    lines = page.read_text().splitlines()
    at, why = 0, ""
    while at < len(lines):
        line = lines[at].strip()
        at += 1
        opened = _FENCE.fullmatch(line)
        if opened is None:
            said = _NOT_RUN.fullmatch(line)
            why = said["why"] if said else ""
            continue
        directive, info = opened["directive"], opened["info"].strip()
        if opened["fence"][0] == ":":
            continue  # around text, where other fences may be
        first = at
        while lines[at].strip() != opened["fence"]:
            at += 1
        content, caption = lines[first:at], ""
        at += 1
        while directive and content and (option := re.fullmatch(r":[a-z-]+:.*", content[0])):
            named = _CAPTION.fullmatch(option[0])
            caption = named["name"] if named else caption
            content = content[1:]
        text = "\n".join(content).strip("\n") + "\n"
        if directive in (None, "code-block"):
            yield Block(page, first, info, caption, text, why)
        why = ""


def commands(block: Block) -> list[Command]:
    """Return the commands of a block: its lines with a prompt, or each line when none has one."""
    lines = block.text.splitlines()
    if not any(line.startswith("$ ") for line in lines):
        return [Command(line, ()) for line in lines if line.strip() and line[0] != "#"]
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found and found[-1][0].endswith("\\"):
            found[-1] = (f"{found[-1][0]}\n{line.removeprefix('> ')}", [])
        elif found and line.strip():
            found[-1][1].append(line)
    return [Command(text, tuple(output)) for text, output in found]


def shape(line: str) -> str:
    """Return a line with its figures and its spacing made equal: what two runs have in common."""
    return " ".join(_NUMBER.sub("N", line).split())
