"""A real headless Chromium, driven over its DevTools websocket: what a page logs, asks for, shows and holds.

Debian: `apt-get install chromium`. Elsewhere set SPECFORGE_CHROMIUM to a Chrome or Chromium binary.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)  # fmt: skip
START_SECONDS = 60.0


@dataclass
class Look:
    """What was seen of a page. console: text of warnings and errors; requests: URLs it asked for; answers: results of
    the expressions; png: a picture of the whole page."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    png: bytes = b""


def chromium() -> str:
    """The browser's path; the test fails, and says what to install, where there is none."""
    wanted = os.environ.get("SPECFORGE_CHROMIUM")
    found = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(
            "no Chromium found: `apt-get install chromium`, or set SPECFORGE_CHROMIUM to a Chrome binary", pytrace=False
        )
    return found


def look_at(
    path: Path, expressions: Mapping[str, str], width: int = 1280, height: int = 900, dark: bool = False
) -> Look:
    """Open a local file in a window of that size and evaluate JavaScript expressions in it."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        log_path = Path(profile) / "browser.log"
        with open(log_path, "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            port = _debugging_port(Path(profile), process, log_path)
            return asyncio.run(_look(port, path.resolve().as_uri(), expressions, width, height, dark))
        finally:
            process.terminate()
            process.wait(30)


def _debugging_port(profile: Path, process: subprocess.Popen[bytes], log_path: Path) -> int:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        file = profile / "DevToolsActivePort"
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        if process.poll() is not None:
            break
        time.sleep(0.05)
    pytest.fail(f"Chromium did not start: {log_path.read_text(errors='replace')[-500:]}", pytrace=False)


async def _look(port: int, url: str, expressions: Mapping[str, str], width: int, height: int, dark: bool) -> Look:
    look = Look()
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
            pages = [page for page in await reply.json() if page["type"] == "page"]
        async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket, look)
            for domain in ("Runtime", "Log", "Network", "Page"):
                await tab.call(f"{domain}.enable")
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            await tab.call("Emulation.setDeviceMetricsOverride", metrics)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await tab.call("Emulation.setEmulatedMedia", {"features": [scheme]})
            await tab.call("Page.navigate", {"url": url})
            await tab.loaded()
            for name, expression in expressions.items():
                result = await tab.call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
                assert "exceptionDetails" not in result, result
                look.answers[name] = result["result"].get("value")
            shot = await tab.call("Page.captureScreenshot", {"captureBeyondViewport": True})
            look.png = base64.b64decode(shot["data"])
    return look


class _Tab:
    """Calls and events of one page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, look: Look) -> None:
        self.socket, self.look = socket, look
        self.last_id = 0
        self.is_loaded = False

    async def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        self.last_id += 1
        await self.socket.send_json({"id": self.last_id, "method": method, "params": params or {}})
        while True:
            message = await self._next()
            if message.get("id") == self.last_id:
                assert "error" not in message, message
                return message["result"]  # type: ignore[no-any-return]

    async def loaded(self) -> None:
        while not self.is_loaded:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = await self.socket.receive_json(timeout=START_SECONDS)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.look.console.append(" ".join(str(arg.get("value")) for arg in params["args"]))
        elif method == "Log.entryAdded":
            self.look.console.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.look.console.append(str(params["exceptionDetails"]))
        elif method == "Network.requestWillBeSent":
            self.look.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.is_loaded = True
        return message
