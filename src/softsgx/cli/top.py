"""Show running programs live: enclaves, page faults, evictions, EPC, limits.

The command shows every softsgx run and record of this user, or the one with process id PID, until
the last of them has ended, or you press q or Ctrl-C.  Rates are averages since the last update; at
the first update, and with --once, since the start of the run.

Examples:
  softsgx top                        all runs, once a second
  softsgx top 4711 --interval 0.2    one of them, five times a second
  softsgx top --once                 print it once
  softsgx top --json                 one JSON object a line, until the last run has ended

exit status: 0; 1 when no program runs; 2 when PID is no run, or standard output is no terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.live import Live as Drawing

from softsgx.cli._common import tell
from softsgx.cli._signals import EndedBySignal
from softsgx.errors import SoftSgxError
from softsgx.live import running_pids
from softsgx.live.screen import screen
from softsgx.live.watching import Watching

__all__ = ["NAME", "configure", "run"]

NAME = "top"

_SHORTEST_S, _LONGEST_S = 0.05, 3600.0
_NOTHING_RUNS = 1
_QUIT = "q"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "pid",
        nargs="?",
        type=_pid,
        metavar="PID",
        help="process of softsgx run or record (default: all)",
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="from one update to the next (default 1)",
    )
    parser.add_argument("--once", action="store_true", help="print the current state, and exit")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Show the runs; return the exit status."""
    console = Console(highlight=False, markup=False, emoji=False)
    # Not console.is_terminal: FORCE_COLOR makes that true of a pipe.
    can_draw = os.isatty(1) and not console.is_dumb_terminal
    if not (args.once or args.json or can_draw):
        raise SoftSgxError(
            "standard output: not a terminal that can be drawn on; give --once or --json"
        )
    watching = Watching(args.pid)
    if not watching.look():
        return _nothing(args.pid)
    if args.json:
        _stream(watching, args.interval, once=args.once)
    elif args.once:
        _print(watching, console)
    else:
        _watch(watching, console, args.interval)
    return 0


def _nothing(pid: int | None) -> int:
    if pid is None:
        tell("softsgx: no program runs; start one with softsgx run -- PROGRAM")
        return _NOTHING_RUNS
    running = ", ".join(map(str, running_pids())) or "none"
    raise SoftSgxError(f"{pid}: not a run of softsgx; give one of those that run ({running})")


def _stream(watching: Watching, interval_s: float, *, once: bool) -> None:
    """Print an object a line until the last run has ended."""
    following = _ticks(interval_s)
    while True:
        print(json.dumps(watching.document(), separators=(",", ":")), flush=True)
        if once:
            return
        time.sleep(next(following))
        if not watching.look():
            return


def _print(watching: Watching, console: Console) -> None:
    console.print(screen(watching.runs, width=console.width, ascii_only=console.options.ascii_only))


def _watch(watching: Watching, console: Console, interval_s: float) -> None:
    """Draw until the last run has ended or the user quits."""
    following, running = _ticks(interval_s), True
    try:
        with (
            _ended_by_signals(),
            _keys() as key,
            Drawing(console=console, screen=True, auto_refresh=False) as drawing,
        ):
            while running:
                picture = screen(
                    watching.runs,
                    width=console.width,
                    height=console.height,
                    ascii_only=console.options.ascii_only,
                )
                drawing.update(picture, refresh=True)
                if key(next(following)).lower() == _QUIT:
                    return
                running = watching.look()
    except KeyboardInterrupt:
        return
    _print(watching, console)
    tell("softsgx: all programs have ended; this was the last update")


def _ticks(interval_s: float) -> Iterator[float]:
    """Yield the seconds to wait until the next update, at a fixed rate if updates are fast."""
    due = time.monotonic()
    while True:
        now = time.monotonic()
        due = max(due + interval_s, now)
        yield due - now


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits some seconds for a key and returns it; empty: no key.

    Until the context ends, keys arrive without Enter and are not shown.  Ctrl-Z is off: a stopped
    command would leave its drawing on the shell's screen.
    """
    descriptor = 0
    if not os.isatty(descriptor):
        yield _no_key
        return
    before = termios.tcgetattr(descriptor)
    changed = termios.tcgetattr(descriptor)
    changed[3] &= ~(termios.ICANON | termios.ECHO)
    changed[6][termios.VSUSP] = b"\0"

    def key(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        if not ready:
            return ""
        try:
            return os.read(descriptor, 1).decode(errors="replace") or _QUIT
        except OSError:  # the terminal is gone
            return _QUIT

    termios.tcsetattr(descriptor, termios.TCSADRAIN, changed)
    try:
        yield key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command by an exception, which restores the terminal."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise EndedBySignal(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pid(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"process {text!r}; give a number from 1")
    return int(text)


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _SHORTEST_S <= seconds <= _LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"interval {text!r}; give seconds from {_SHORTEST_S} to {_LONGEST_S:.0f}"
        )
    return seconds
