"""A headless Chromium, driven over its debugging pipe: no package is needed for it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 60.0


def executable() -> str | None:
    """Returns the browser that DETCLIP_BROWSER names, or one of the machine; None without one."""
    return os.environ.get("DETCLIP_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page of the browser; messages are those of the DevTools protocol, ended by a zero byte."""

    def __init__(self, writing: int, reading: int):
        self._writing, self._reading, self._rest = writing, reading, b""
        self._num, self._session = 0, ""
        self.requested: list[str] = []  # addresses
        self.problems: list[str] = []  # of the console
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns what a method answers."""
        self._num += 1
        message = {"id": self._num, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._num:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._reading], [], [], TIMEOUT_S)[0] or not (
                part := os.read(self._reading, 1 << 16)
            ):
                raise TimeoutError("the browser says nothing")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])

    def run(self, code: str) -> Any:
        """Returns the value of JavaScript, which may be a promise."""
        found = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def wait(self, code: str) -> None:
        """Returns when JavaScript is true."""
        end = time.monotonic() + TIMEOUT_S
        while not self.run(f"Boolean({code})"):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {code}; the page says {self.run('document.body.innerText')!r}")
            time.sleep(0.05)

    def open(self, address: str, *, width: int = 1280, height: int = 900) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Page.navigate", url=address)
        self.wait("document.body && document.body.dataset.ready")

    def mouse(self, *points: tuple[float, float]) -> None:
        """Presses at the first point of the window, moves over the others, lets go at the last."""
        events = [("mousePressed", points[0]), *(("mouseMoved", point) for point in points[1:])]
        for kind, (x, y) in [*events, ("mouseReleased", points[-1])]:
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        area = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({area})")
        self.mouse((x, y))

    def type(self, selector: str, text: str) -> None:
        """Replaces what a field holds, key by key as a person would."""
        self.run(f"(field => {{ field.focus(); field.select(); }})(document.querySelector({selector!r}))")
        self("Input.dispatchKeyEvent", type="keyDown", key="Delete", code="Delete", windowsVirtualKeyCode=46)
        if text:
            self("Input.insertText", text=text)

    def choose_file(self, selector: str, path: pathlib.Path) -> None:
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: pathlib.Path) -> None:
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def started(profile: pathlib.Path) -> Iterator[Page]:
    """Yields a page of a new browser, which ends afterwards."""
    to_browser, writing = os.pipe()
    reading, from_browser = os.pipe()
    flags = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--no-sandbox"]
    flags += [
        "--disable-dev-shm-usage",
        "--disable-extensions",
        "--disable-component-update",
        f"--user-data-dir={profile}",
    ]
    command = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'  # the numbers that the browser expects
    process = subprocess.Popen(
        ["/bin/bash", "-c", command, "bash", str(executable()), *flags, "--remote-debugging-pipe", "about:blank"],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(writing, reading)
    finally:
        os.close(writing)
        os.close(reading)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
