"""How a program of this project begins and ends, whatever its user does meanwhile."""

import argparse
import math
import os
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from clm_owt.console import close_output
from clm_owt.errors import InputError, exit_with

if typing.TYPE_CHECKING:  # run_clm_owt.py begins with this module, and imports nothing slow before it
    from clm_owt.recipe import Rule

Number = typing.TypeVar("Number", int, float)


def end_quietly_at_interrupts() -> None:
    """From here on a Ctrl-C ends the process by the signal itself, without a traceback. For the seconds in which a
    program imports what it needs, and has nothing to clean up yet."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(main: Callable[[Sequence[str]], int | None]) -> typing.NoReturn:
    """Leave with what `main(arguments)` gives, 0 unless it says otherwise; with a line and 2 for what cannot work, 1
    for a file or a connection that failed, 130 after a Ctrl-C; with 141 where nobody reads the output any more, as in
    `... | head`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status: int | None = 0
    try:
        status = main(sys.argv[1:])
    except InputError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    finally:
        close_output()
    sys.exit(status)


def number(kind: type[Number], rule: "Rule") -> Callable[[str], Number]:
    """A type of argparse: whole numbers (int) or finite ones (float), for which a rule as those of a recipe's keys
    holds."""

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if (isinstance(value, float) and not math.isfinite(value)) or not rule.holds(value):
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} does not work; expected a {noun} {rule.text}")
        return value

    return read


def count(text: str) -> int:
    """A type of argparse: a whole number of at least 1."""
    from clm_owt.recipe import at_least

    return number(int, at_least(1))(text)


def picture_file(*endings: str) -> Callable[[str], Path]:
    """A type of argparse: an output file whose name has one of these endings, which tells its format."""

    def read(text: str) -> Path:
        path = output_file(text)
        if path.suffix not in endings:
            expected = " or ".join(endings)
            raise argparse.ArgumentTypeError(f"{text!r} does not work; expected a name that ends in {expected}")
        return path

    return read


def output_file(text: str) -> Path:
    """The path of a file to be written, for an option of argparse, which reports a folder that is not there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}; make it, or name another file")
    return path
