"""The errors that a user can meet, and how the program leaves with them."""

import errno
import os
import sys
import typing
from collections.abc import Sequence


class InputError(Exception):
    """A recipe or an input that cannot work. The message says what it is and how to mend it; exit status 2."""


class RecipeError(InputError):
    """All problems of one recipe, one or two lines each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class RunFailed(Exception):
    """An error of a run, not of its recipe, that a line or two tell completely; exit status 1. `final`: the same
    command would meet it again."""

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says so: an OSError, or one of the libraries in Rust (safetensors, tokenizers)."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def exit_with(error: InputError) -> typing.NoReturn:
    """Print what cannot work, one `error:` for each problem, and leave with status 2."""
    shared_by_all_processes = isinstance(error, RecipeError)
    if not shared_by_all_processes or os.environ.get("RANK", "0") == "0":
        for problem in getattr(error, "problems", [str(error)]):
            print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def one_line(error: BaseException) -> str:
    """An error as its type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
