"""How a program of this project begins and ends, whatever its user does meanwhile."""

import argparse
import os
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from clm_owt.console import close_output
from clm_owt.errors import InputError, exit_with


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


def output_file(text: str) -> Path:
    """The path of a file to be written, for an option of argparse, which reports a folder that is not there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}; make it, or name another file")
    return path
