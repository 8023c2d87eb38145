"""A page in headless Chromium, seen through its DevTools protocol: what is drawn, what was asked for, what failed."""

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

COMMAND = [
    *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no network
    *("--remote-debugging-port=0", "about:blank"),
]


class Page:
    """`requests` are the addresses that the page asked for, `failures` what of them failed and what its scripts threw
    or logged as an error. Both grow while one waits."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._sent = 0
        self.requests: list[str] = []
        self.failures: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a DevTools method."""
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": params})
        async with asyncio.timeout(60):
            while (message := await self._socket.receive_json()).get("id") != self._sent:
                self._note(message["method"], message["params"])
        assert "error" not in message, message
        return message["result"]

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Network.loadingFailed":
            self.failures.append(params["errorText"])
        elif event == "Runtime.exceptionThrown":
            self.failures.append(params["exceptionDetails"]["exception"]["description"])
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.failures.append(params["entry"]["text"])

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which JSON can hold."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """The first value of the expression that is true."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (value := await self.evaluate(expression)):
                    await asyncio.sleep(0.1)
                return value
        raise AssertionError(f"not within {seconds} s: {expression}; {self.failures}")

    async def move_mouse(self, x: float, y: float) -> None:
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


@contextlib.asynccontextmanager
async def open_page(address: str, home: Path) -> AsyncIterator[Page]:
    """The page at `address` in a browser of its own, whose profile lies in `home`."""
    profile = home / "chromium"
    process = subprocess.Popen([*COMMAND, f"--user-data-dir={profile}"], stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not (port_file.exists() and len(lines := port_file.read_text().split()) == 2):
                assert process.poll() is None
                await asyncio.sleep(0.1)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{lines[0]}") as session:
            answer = await session.get("/json/list")
            (tab,) = [target for target in json.loads(await answer.text()) if target["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Network", "Runtime", "Log", "Page"):
                    await page.call(f"{domain}.enable")
                size = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
                await page.call("Emulation.setDeviceMetricsOverride", **size)
                await page.call("Page.navigate", url=address)
                yield page
    finally:
        process.terminate()
        process.wait(timeout=20)
