"""A headless browser for the tests of pages: Chromium, where it is installed."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request

import pytest

PROGRAMS = "chromium", "chromium-browser", "google-chrome"


def start(folder, size=(1500, 1000)):
    """A browser whose profile is a new folder; skips the test where there is none."""
    pytest.importorskip("websocket", reason="needs websocket-client to speak to a browser")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    return Browser(program, folder, size)


class Browser:
    """Headless Chromium, spoken to by its DevTools protocol."""

    CODES = {"Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}

    def __init__(self, program, folder, size=(1500, 1000)):
        import websocket

        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--disable-sync", "--no-first-run", f"--window-size={size[0]},{size[1]}", f"--user-data-dir={folder}",
             "--remote-debugging-port=0", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port, deadline = folder / "DevToolsActivePort", time.monotonic() + 30
        while not port.exists() or "\n" not in port.read_text():
            assert time.monotonic() < deadline and self.process.poll() is None, "the browser does not start"
            time.sleep(0.05)
        self.address = f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"
        pages = json.load(urllib.request.urlopen(self.address, timeout=30))
        url = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self.socket, self.sent, self.requests = websocket.create_connection(url, 30, suppress_origin=True), 0, []
        self.call("Network.enable")

    def call(self, method, **params):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == self.sent:
                assert "error" not in message, message
                return message["result"]

    def ask(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url):
        """Go to a page and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def wait(self, condition, seconds=20):
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.ask(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"waited in vain for {condition}"
            time.sleep(0.02)

    def screenshot(self, file):
        """Write what the window shows to a PNG file."""
        with open(file, "wb") as png:
            png.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def press(self, key):
        text = {"Enter": {"text": "\r"}, " ": {"text": " "}}.get(key, {})
        for kind, more in (("keyDown", text), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code="Space" if key == " " else key,
                      windowsVirtualKeyCode=self.CODES[key], **more)

    def click(self, selector):
        x, y = self.ask(f"new Promise(tell => {{ const e = document.querySelector({json.dumps(selector)});"
                        f" e.scrollIntoView({{block: 'center'}});"
                        f" requestAnimationFrame(() => requestAnimationFrame(() => {{"  # when it is on the screen
                        f" const b = e.getBoundingClientRect();"
                        f" tell([b.x + b.width / 2, b.y + b.height / 2]); }})); }})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
