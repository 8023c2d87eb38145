"""Servers that fail for a while: what may pass is tried again after growing pauses, and each time it is said."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from clm_owt.console import print_lines
from clm_owt.errors import InputError

T = TypeVar("T")


# Seconds before reading, and before a first look-up, is tried again.
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60)


LOOKUP_PAUSES = (1, 2, 4)


SECONDS_OF_SILENCE = 60.0


# Servers that fail for a while


def limit_silence() -> None:
    """Give the Hub's client a time limit, between two signs of life; it waits for ever by default."""
    import httpx2
    import huggingface_hub
    from huggingface_hub.utils._http import default_client_factory

    def client() -> "httpx2.Client":
        client = default_client_factory()
        client.timeout = httpx2.Timeout(SECONDS_OF_SILENCE, connect=min(10.0, SECONDS_OF_SILENCE))
        return client

    huggingface_hub.set_client_factory(client)


def patiently(attempt: Callable[[], T]) -> T:
    """What `attempt()` gives, which is repeated while it fails for reasons that may pass."""
    pauses = iter(LOOKUP_PAUSES)
    while True:
        try:
            return attempt()
        except InputError as error:
            wait_for_better(error, pauses)


def wait_for_better(error: InputError, pauses: Iterator[float]) -> None:
    """Say what went wrong and wait for the next of `pauses`; raises the error if it will not pass, or none is left."""
    pause = next(pauses, None) if may_pass(error) else None
    if pause is None:
        raise error
    print_lines(f"{str(error).splitlines()[0]}; trying again in {pause:g} s")
    time.sleep(pause)


def may_pass(error: BaseException) -> bool:
    """Whether it came of a connection or of a server in trouble, rather than of the request or of the data."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
        if isinstance(status, int):
            return status >= 500 or status in (408, 425, 429)
        if isinstance(error, OfflineModeIsEnabled):
            return False
        error = error.__cause__ or error.__context__
    lost = (ConnectionError, TimeoutError, asyncio.TimeoutError, httpx2.TransportError)
    return any(isinstance(e, lost) or type(e).__module__.startswith("aiohttp") for e in seen)
