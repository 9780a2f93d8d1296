"""A real browser for tests: headless Chromium, driven over WebDriver with the standard library only."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Pages are files; whatever a browser looks up on its own is switched off.
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def program() -> str | None:
    """The browser of this machine, if it has a driver too."""
    found = [path for name in PROGRAMS if (path := shutil.which(name))]
    return found[0] if found and shutil.which("chromedriver") else None


@dataclass(frozen=True)
class Browser:
    """One window."""

    session: str  # address of the WebDriver session

    def call(self, method: str, path: str, **body: Any) -> Any:
        """A WebDriver command; its value."""
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self.session}{path}", data, {"Content-Type": "application/json"})
        request.method = method
        try:
            with LOCAL.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {json.load(error)['value']['message']}") from error

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window whose page is `width` pixels wide, and wait until it is drawn."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.chrome("Emulation.setEmulatedMedia", features=[scheme])
        self.call("POST", "/url", url=page.resolve().as_uri())

    def chrome(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns, run in the page."""
        return self.call("POST", "/execute/sync", script=script, args=arguments)

    def click(self, selector: str) -> None:
        """Click on the first element that matches, as a mouse does."""
        element = self.call("POST", "/element", using="css selector", value=selector)
        self.call("POST", f"/element/{next(iter(element.values()))}/click")

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window."""
        steps = [{"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}]
        self.call("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": steps}])

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        steps = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": steps}])

    def log(self) -> list[str]:
        """What the page complained of since the last call: errors, warnings, refused requests."""
        return [entry["message"] for entry in self.call("POST", "/se/log", type="browser")]

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        size = self.chrome("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        return base64.b64decode(self.chrome("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])


@contextmanager
def start(profile: Path, arguments: Sequence[str] = ()) -> Iterator[Browser]:
    """A browser with an empty profile, for the length of a block."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = _port(driver)
        options = {"binary": program(), "args": [*ARGUMENTS, f"--user-data-dir={profile}", *arguments]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        opened = Browser(f"http://127.0.0.1:{port}").call(
            "POST", "/session", capabilities={"alwaysMatch": {"browserName": "chrome", **wanted}}
        )
        browser = Browser(f"http://127.0.0.1:{port}/session/{opened['sessionId']}")
        try:
            yield browser
        finally:
            browser.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(10)


def _port(driver: subprocess.Popen[str]) -> int:
    """The port that the driver chose, from what it prints."""
    assert driver.stdout is not None
    deadline = time.monotonic() + 30
    for line in driver.stdout:
        words = line.rstrip(". \n").split()
        if "started" in words and "port" in words:
            return int(words[-1])
        if time.monotonic() > deadline:
            break
    raise RuntimeError("chromedriver did not start")
