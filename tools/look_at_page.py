"""Open a page in a real browser, take pictures, and report errors.

    python tools/look_at_page.py REPORT.html --out DIR [--browser PATH]

A headless Chromium (on the path, or `--browser`) opens the page at the widths of a phone and of a desktop, in light
and dark. Pictures of the whole page are saved in DIR. The tool prints one line for every error on the console, every
request that leaves the page, and every width at which the page scrolls sideways, also with folded parts opened. The
exit code is 1 if there is a line.

The tool uses the browser's DevTools protocol over two pipes, so it needs only the browser.
"""

import argparse
import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
SIZES = {360: 740, 1280: 800}
SCHEMES = ("light", "dark")
PATIENCE = 60.0  # seconds
READ_FD, WRITE_FD = 3, 4  # file descriptors of the browser's pipes
WIDEST = """
(() => {
  const found = [...document.querySelectorAll("body *")].find((element) => {
    for (let up = element; up; up = up.parentElement) {
      if (up !== document.body && getComputedStyle(up).overflowX !== "visible") return false;
    }
    return element.getBoundingClientRect().right > WIDTH + 0.5;
  });
  return [document.documentElement.scrollWidth, found ? found.outerHTML.slice(0, 80) : ""];
})()
"""
OPEN_ALL = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"


class Browser:
    """A page in a headless Chromium.

    Attributes:
        events: Events that the browser sent since the last call.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest, self._numbers = b"", itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps({**message, **session}).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            sys.exit(f"the browser refuses {method}: {answer['error'].get('message')}")
        return dict(answer["result"])

    def wait_for(self, method: str) -> None:
        """Wait for an event."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def evaluate(self, script: str) -> Any:
        """Return the value of a script on the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self._from, 2**20) if ready else b""
            if not part:
                sys.exit("the browser ended" if ready else f"no message from the browser within {PATIENCE:.0f} s")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browsing(path: str) -> Iterator[Browser]:
    """Start a browser, and end it on exit."""
    ours, theirs = [], []
    for reading in (True, False):  # its input, its output; numbered above READ_FD and WRITE_FD
        made = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in made]
        for end in made:
            os.close(end)
        theirs.append(ends[0 if reading else 1])
        ours.append(ends[1 if reading else 0])

    def place() -> None:
        os.dup2(theirs[0], READ_FD)
        os.dup2(theirs[1], WRITE_FD)

    words = [path, "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars"]
    words += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words.append(f"--user-data-dir={profile}")
        silent = subprocess.DEVNULL
        process = subprocess.Popen(
            words, preexec_fn=place, pass_fds=(READ_FD, WRITE_FD), stdin=silent, stdout=silent, stderr=silent
        )
        for end in theirs:
            os.close(end)
        try:
            yield Browser(ours[0], ours[1])
        finally:
            process.terminate()
            process.wait()


def look(browser: Browser, page: Path, width: int, scheme: str, picture: Path) -> list[str]:
    """Open a page, take its picture, and return its errors."""
    browser.events.clear()
    size = {"width": width, "height": SIZES[width], "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", **size)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", media="screen", features=media)
    browser.call("Page.navigate", url=page.as_uri())
    browser.wait_for("Page.loadEventFired")
    wrong = []
    for opened in (False, True):
        if opened:
            browser.evaluate(OPEN_ALL)
        wide, element = browser.evaluate(WIDEST.replace("WIDTH", str(width)))
        if wide > width:
            wrong.append(f"{wide} px wide{', all parts opened' if opened else ''}: scrolls sideways at {element}")
            break
        if not opened:
            whole = browser.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": width, "height": whole["height"], "scale": 1}
            shot = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
            picture.write_bytes(base64.b64decode(shot["data"]))
    return wrong + [line for event in browser.events for line in complaints(event, page.as_uri())]


def complaints(event: dict[str, Any], address: str) -> list[str]:
    """Return the errors in an event."""
    method, params = event.get("method"), event.get("params", {})
    if method == "Network.requestWillBeSent":
        url = params["request"]["url"]
        return [] if url.split("#")[0] == address or url.startswith("data:") else [f"request leaves it: {url}"]
    if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        return [f"console: {' '.join(str(value.get('value', '')) for value in params['args'])}"]
    if method == "Runtime.exceptionThrown":
        return [f"exception: {params['exceptionDetails'].get('text')}"]
    if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        return [f"console: {params['entry']['text']}"]
    return []


def main() -> None:
    """Parse the options, open the page and print its errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="HTML file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--browser", help="path of a Chromium (default: the first on the path)")
    args = parser.parse_args()
    browser = args.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"no browser on the path ({', '.join(BROWSERS)}); give --browser PATH")
    if not args.page.is_file():
        parser.error(f"{args.page}: no such file; give an HTML file")
    args.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    with browsing(browser) as page:
        for width, scheme in itertools.product(SIZES, SCHEMES):
            picture = args.out / f"{args.page.stem}-{width}-{scheme}.png"
            wrong += [
                f"{width} px, {scheme}: {line}" for line in look(page, args.page.resolve(), width, scheme, picture)
            ]
            print(f"picture: {picture}")
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
