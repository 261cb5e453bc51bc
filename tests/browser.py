"""Headless Chromium, driven over its DevTools protocol by a pair of pipes."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NODE_MODULES = os.environ.get("MINISMOE_NODE_MODULES", "")
VENDORED = ("@huggingface/transformers/dist/transformers.min.js", *(
    f"onnxruntime-web/dist/ort-wasm-simd-threaded{build}.{end}"
    for build in ("", ".asyncify") for end in ("mjs", "wasm")))
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and Path(NODE_MODULES, VENDORED[0]).is_file()),
    reason="no chromium, or MINISMOE_NODE_MODULES names no node_modules with "
           "@huggingface/transformers")


def vendor(folder: Path) -> None:
    """What `npm install --prefix folder/vendor` leaves there, as far as the page reads it."""
    for name in VENDORED:
        file = folder / "vendor" / "node_modules" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(NODE_MODULES, name), file)


class Browser:
    """One tab; `with Browser() as tab` closes it. Keys of `flags` are Chromium's."""

    def __init__(self, *flags: str):
        self.profile = tempfile.mkdtemp()
        import fcntl  # POSIX alone has it

        theirs_in, self.ours_out = os.pipe()
        self.ours_in, theirs_out = os.pipe()

        def number() -> None:                # as Chromium expects, past what is 3 or 4 now
            high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
            for end, number in zip(high, (3, 4)):
                os.dup2(end, number)
                os.close(end)

        self.process = subprocess.Popen(
            [str(CHROMIUM), "--headless=new", "--no-sandbox", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-quic", "--disable-dev-shm-usage", "--remote-debugging-pipe",
             f"--user-data-dir={self.profile}", *flags],
            preexec_fn=number, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.count, self.received, self.session, self.worker = 0, b"", "", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False,
                  flatten=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.ours_in)
        os.close(self.ours_out)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; RuntimeError if it fails or takes two minutes."""
        self.count += 1
        session = session or self.session
        message = {"id": self.count, "method": method, "params": params,
                   **({"sessionId": session} if session else {})}
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            if not select.select([self.ours_in], [], [], 120)[0]:
                raise RuntimeError("the browser does not answer")
            self.received += os.read(self.ours_in, 1 << 20)
        text, self.received = self.received.split(b"\0", 1)
        message = json.loads(text)
        if message.get("method") == "Target.attachedToTarget" and (
                message["params"]["targetInfo"]["type"] == "worker"):
            self.worker = message["params"]["sessionId"]
        return message

    def js(self, code: str, session: str = "") -> Any:
        """The value of an expression in the page, awaited if it is a promise.

        session: `worker`, for an expression in the page's last worker.
        """
        found = self.call("Runtime.evaluate", session, expression=code, awaitPromise=True,
                          returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def text(self, selector: str) -> str:
        """The text of the last element that matches, "" if none does."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)"
                       "?.textContent ?? ''")

    def wait(self, code: str, seconds: float = 60) -> Any:
        """The first value of an expression that is true; AssertionError shows the page's text."""
        end = time.monotonic() + seconds
        while not (found := self.js(code)):
            assert time.monotonic() < end, f"{code}: {self.text('body')[-500:]}"
            time.sleep(0.05)
        return found

    def wait_status(self, *starts: str, seconds: float = 60) -> str:
        """The page's status line once it starts with one of these."""
        return self.wait(f"{json.dumps(starts)}.some(s => document.querySelector('#status')"
                         "?.textContent.startsWith(s)) && document.querySelector('#status')"
                         ".textContent", seconds)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=code, text="\r" if key == "Enter" else "")

    def click(self, selector: str) -> None:
        """A click with the mouse in the middle of an element."""
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector("
                       f"{json.dumps(selector)}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
