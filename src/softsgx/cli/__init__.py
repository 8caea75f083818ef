"""The command ``softsgx``: one module for each verb, named in ``VERBS``.

A verb's module has a docstring, which is its help, ``NAME``, ``configure(parser)`` and
``run(args) -> int``.  Exit status 0: fine; 1: found something; 2: bad input.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from errno import EDQUOT, EFBIG, EIO, ENOSPC, EPIPE
from importlib import import_module
from typing import Protocol, TextIO, cast

import softsgx
from softsgx import compiled
from softsgx.cli._common import discard, tell
from softsgx.cli._help import HelpFormatter
from softsgx.cli._signals import EndedBySignal
from softsgx.errors import SoftSgxError

__all__ = ["VERBS", "Command", "command_of", "main", "parser_of", "whole_parser"]

_DESCRIPTION = """\
SGX without the hardware: read, measure, sign and run enclaves on a software machine with a finite,
encrypted Enclave Page Cache.

softsgx is an emulation: it protects nothing from the owner of the machine it runs on.  Never
give an enclave that runs here a secret that the machine's owner must not know."""

_EPILOG = """\
examples:
  softsgx build enclave.c --host host.c   an enclave from C, and the program that uses it
  softsgx run --epc 16MiB -- ./app        run a program that uses SGX
  softsgx top                             faults and evictions of running programs, live
  softsgx record -o app.trace -- ./app    record which pages it uses
  softsgx plan app.trace                  how much EPC does it need?  record makes the trace
  softsgx inspect enclave.signed.so       what is in it: pages, threads, signature
  softsgx measure enclave.signed.so       its MRENCLAVE, and whether its signature fits
  softsgx load enclave.signed.so          do the driver and EINIT accept it?
  softsgx sign --new-key key.pem enclave.sgxs
                                          make a key, sign with it, write enclave.sig
  softsgx defects run B11                 a known defect of Linux, and the schedule that shows it

exit status: 0 success, 1 a check failed or something was found, 2 bad input.
softsgx VERB --help explains a verb."""


class Command(Protocol):
    """The interface of a verb's module."""

    NAME: str
    __doc__: str | None

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the verb; return the exit status."""


VERBS = (
    "tour",
    "build",
    "run",
    "top",
    "record",
    "plan",
    "doctor",
    "inspect",
    "measure",
    "sign",
    "load",
    "defects",
    "explore",
)


_OUTPUT_FAILURES = frozenset({EDQUOT, EFBIG, EIO, ENOSPC, EPIPE})


def command_of(verb: str) -> Command:
    """Return the module of a verb."""
    return cast(Command, import_module(f"softsgx.cli.{verb}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status, 128 + n where signal n ends the command.

    Args:
        argv: the words behind the command's name; ``None``: those of this process.  Then a signal
            that ends the command also ends the process.
    """
    _complete_standard_files()
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        number = int(signal.SIGINT)
    except EndedBySignal as ended:
        number = ended.number
    finally:
        _end_output(sys.stderr, 2)
    return 128 + number if argv is not None else _end_by(number)


def _run(argv: Sequence[str]) -> int:
    parser = _parser(_wanted(argv))
    args = parser.parse_args(argv)
    args.words = list(argv)
    if not hasattr(args, "command"):
        parser.print_help()
        return 2
    command: Command = args.command
    try:
        status = command.run(args)
        sys.stdout.flush()
    except SoftSgxError as error:
        tell(f"softsgx: {error}")
        return error.exit_status
    except OSError as error:
        # An error of a file has its name; an error of standard output has none.
        if error.errno not in _OUTPUT_FAILURES or error.filename is not None:
            raise
        _end_output(sys.stdout, 1)
        if not isinstance(error, BrokenPipeError):  # the reader has closed the pipe: no error
            tell(f"softsgx: standard output: {error.strerror}")
        return 1
    return status


def _complete_standard_files() -> None:
    """Open /dev/null for each closed standard file, or other files would get its number.

    execve closes these descriptors in programs that the command runs.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _end_output(file: TextIO, descriptor: int) -> bool:
    """Flush an output; return whether that has failed.

    After a failure the rest is discarded, or the interpreter would fail on it at its exit.
    """
    try:
        file.flush()
    except OSError:
        discard(descriptor)
        return True
    return False


def _end_by(number: int) -> int:
    """End this process by a signal; return an exit status if the signal does not end it."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number  # the first process of a process namespace survives it


def _wanted(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the verbs to parse; importing all of them takes half a second."""
    first = argv[0] if argv else ""
    if first == "--version":
        return ()
    return (first,) if first in VERBS else VERBS


def _parser(names: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softsgx",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    version = f"softsgx {softsgx.__version__}, {compiled.description}"
    parser.add_argument("--version", action="version", version=version)
    _add_verbs(parser, names)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with every verb."""
    return _parser(VERBS)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser of one verb, as ``softsgx VERB`` has it."""
    parser = argparse.ArgumentParser(prog="softsgx", formatter_class=HelpFormatter)
    return _add_verbs(parser, (verb,))[verb]


def _add_verbs(
    parser: argparse.ArgumentParser, names: tuple[str, ...]
) -> dict[str, argparse.ArgumentParser]:
    """Add the verbs' parsers; return them by name."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for command in map(command_of, names):
        summary, _, rest = (command.__doc__ or "").partition("\n")
        verb = verbs.add_parser(
            command.NAME,
            help=summary.rstrip("."),
            description=summary,
            epilog=rest.strip("\n"),
            formatter_class=HelpFormatter,
        )
        command.configure(verb)
        verb.set_defaults(command=command)
    return verbs.choices
