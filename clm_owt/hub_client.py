"""The HTTP client of huggingface_hub, with a time limit: by default it waits for a silent server for ever."""

import httpx2
import huggingface_hub
from huggingface_hub.utils._http import default_client_factory

TIMEOUT_SECONDS = 60.0  # without a byte sent or received; a whole upload or download may take longer
CONNECT_TIMEOUT_SECONDS = 10.0


def set_timeout() -> None:
    """Have every request of huggingface_hub in this process fail after TIMEOUT_SECONDS of silence."""

    def client() -> httpx2.Client:
        client = default_client_factory()
        client.timeout = httpx2.Timeout(TIMEOUT_SECONDS, connect=min(CONNECT_TIMEOUT_SECONDS, TIMEOUT_SECONDS))
        return client

    huggingface_hub.set_client_factory(client)
