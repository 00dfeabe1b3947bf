"""A headless browser for tests: what the WebDriver protocol (W3C) needs of a client, in a page.

The distribution's chromium and chromedriver (`apt-get install chromium chromium-driver`); where they are missing, or
BITBOOK_CHROMEDRIVER names another that cannot start, tests are skipped with the reason.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's own name for a reference to an element
_STARTS = 60.0  # seconds
_ANSWERS = 20.0


class Browser:
    """One window; every method is one command of the protocol."""

    def __init__(self, url: str, driver: int) -> None:
        self.url = url
        self.driver = driver

    def command(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method in ("GET", "DELETE") else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {json.load(error)['value']['message']}") from error

    def open(self, page: Path, fragment: str = "") -> None:
        self.command("POST", "/url", {"url": "about:blank"})  # or another fragment would not load the page again
        self.command("POST", "/url", {"url": page.resolve().as_uri() + fragment})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns; elements it returns can be clicked."""
        return self.command("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any) -> None:
        """Until a script returns something true: some events, a dialog's "close" among them, come after the click."""
        end = time.monotonic() + _ANSWERS
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < end, f"{script} still returns {found!r} after {_ANSWERS} s"
            time.sleep(0.02)

    def find(self, css: str) -> dict[str, str]:
        return self.command("POST", "/element", {"using": "css selector", "value": css})

    def click(self, element: str | dict[str, str]) -> None:
        """Click the middle of an element, as a person would: whatever lies above it gets the click."""
        found = self.find(element) if isinstance(element, str) else element
        self.command("POST", f"/element/{found[_ELEMENT]}/click")

    def write(self, css: str, text: str) -> None:
        self.command("POST", f"/element/{self.find(css)[_ELEMENT]}/value", {"text": text})

    def text(self, css: str) -> str:
        return self.command("GET", f"/element/{self.find(css)[_ELEMENT]}/text")

    def emulate(self, **media: str) -> None:
        """Show the page as on another medium, "print" for paper."""
        self.command("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media})

    def errors(self) -> list[str]:
        """What the console complains about since it was asked last."""
        return [entry["message"] for entry in self.command("POST", "/se/log", {"type": "browser"})]

    def processor(self) -> float:
        """Seconds of the processor that all of the browser's processes have taken so far."""
        processes = pytest.importorskip("psutil").Process(self.driver).children(recursive=True)
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of what is seen, or of the whole page."""
        parameters = {"captureBeyondViewport": whole}
        if whole:
            width, height = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
            parameters["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self.command("POST", "/goog/cdp/execute", {"cmd": "Page.captureScreenshot", "params": parameters})
        path.write_bytes(base64.b64decode(taken["data"]))

    def printed(self) -> bytes:
        """The page as a PDF."""
        return base64.b64decode(self.command("POST", "/print", {"page": {"width": 21.0, "height": 29.7}}))


@contextmanager
def browser(folder: Path, *, width: int = 1280, height: int = 900, phone: bool = False) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`; skips the test where there is none."""
    driver = os.environ.get("BITBOOK_CHROMEDRIVER") or shutil.which("chromedriver")
    if driver is None:
        pytest.skip("there is no chromedriver: apt-get install chromium chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "chromedriver.log"
    process = subprocess.Popen([driver, f"--port={port}", f"--log-path={log}"], stdout=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        options: dict[str, Any] = {
            "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        }
        if phone:
            metrics = {"width": width, "height": height, "pixelRatio": 2, "touch": True, "mobile": True}
            options["mobileEmulation"] = {"deviceMetrics": metrics}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        base = Browser(f"http://127.0.0.1:{port}", process.pid)
        try:
            started = base.command("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except AssertionError as error:
            pytest.skip(f"chromium does not start: {str(error)[:200]}")
        window = Browser(f"{base.url}/session/{started['sessionId']}", process.pid)
        try:
            yield window
        finally:
            window.command("DELETE", "")
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _STARTS
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.skip("chromedriver does not start")
