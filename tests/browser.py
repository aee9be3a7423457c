"""A browser without a window, for tests of pages."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image
from websockets.sync.client import connect

CHROME = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Browser:
    """A real one without a window, driven over its debugging socket."""

    def __init__(self, url: str, folder: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [CHROME, "--headless=new", "--no-sandbox", *(flags or ["--disable-gpu"]),
             "--remote-debugging-port=0",
             f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = self.until(lambda: (folder / "DevToolsActivePort").read_text().split()[0])
        pages = f"http://127.0.0.1:{port}/json/list"
        page = self.until(
            lambda: next(p for p in json.load(urllib.request.urlopen(pages)) if p["type"] == "page")
        )
        self.held, self.count = contextlib.ExitStack(), 0
        self.socket = self.held.enter_context(connect(page["webSocketDebuggerUrl"], max_size=2**24))
        self.ask("Page.navigate", url=url)

    @staticmethod
    def until(found, seconds: float = 30.0):
        """What `found` gives as soon as it does and is true."""
        for _ in range(int(20 * seconds)):
            with contextlib.suppress(OSError, IndexError, StopIteration):
                if value := found():
                    return value
            time.sleep(0.05)
        raise AssertionError("the browser did not get there")

    def ask(self, method: str, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=30))
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise ConnectionError(answer["error"]["message"])
                return answer["result"]

    def read(self, expression: str):
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"]
        return result.get("value")

    def key(self, name: str, kind: str) -> None:
        self.ask("Input.dispatchKeyEvent", type=kind, key=name)

    def screen(self) -> np.ndarray:
        """[h, w, 3] uint8: what a person would see."""
        shot = base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))

    def close(self) -> None:
        self.held.close()
        self.process.terminate()
        self.process.wait(timeout=10)
