"""Servers that fail for a while: what they failed to give is asked for again after growing pauses."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx2
from huggingface_hub.errors import OfflineModeIsEnabled

from clm_owt.console import print_lines
from clm_owt.errors import InputError

T = TypeVar("T")

# Seconds before the next attempt.
LOOKUP_PAUSES = (1, 2, 4)  # the first contact, where a wrong name or a missing network is likelier than a busy server
READ_PAUSES = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60)  # amid reading: about six minutes in all

TRANSIENT_STATUSES = (408, 425, 429)  # beside 500 and above


def with_retries(attempt: Callable[[], T]) -> T:
    """What `attempt()` returns; it is called again, after LOOKUP_PAUSES, while it raises a transient `InputError`."""
    pauses = iter(LOOKUP_PAUSES)
    while True:
        try:
            return attempt()
        except InputError as error:
            pause_or_raise(error, pauses)


def pause_or_raise(error: InputError, pauses: Iterator[float]) -> None:
    """Print the error and sleep for the next of `pauses`; raises it if it is not transient or no pause is left."""
    pause = next(pauses, None) if is_transient(error) else None
    if pause is None:
        raise error
    print_lines(f"{str(error).splitlines()[0]}; trying again in {pause:g} s")
    time.sleep(pause)


def is_transient(error: BaseException) -> bool:
    """Whether the error was caused by a connection or an overloaded server, rather than by the request or the data.

    Follows the chain of causes to the first one with an HTTP status, which decides; without one, whether any of them
    is a lost connection does.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
        if isinstance(status, int):
            return status >= 500 or status in TRANSIENT_STATUSES
        if isinstance(error, OfflineModeIsEnabled):
            return False
        error = error.__cause__ or error.__context__
    lost = (ConnectionError, TimeoutError, httpx2.TransportError)
    return any(isinstance(e, lost) or type(e).__module__.startswith("aiohttp") for e in chain)
