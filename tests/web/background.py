"""A browser whose tabs go to the background: playwright's never do, so this one is driven over its debugging port."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from perf.browser import PROGRAM
from tests.web.support import PATIENCE_S

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class BackgroundTab:
    """A tab that can be hidden by another one."""

    def __init__(self, port: str, target: dict[str, str], socket: ClientConnection) -> None:
        self._port = port
        self._id = target["id"]
        self._socket = socket
        self._numbers = itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(PATIENCE_S))
            if message.get("id") == number:
                assert "error" not in message, message
                answer: dict[str, Any] = message["result"]
                return answer

    def value(self, expression: str) -> Any:
        """The value of an expression of the page's `visit`, as if the visitor had clicked."""
        code = f'(async () => {{ const {{ visit }} = await import("/app.js"); return {expression}; }})()'
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def await_page(self) -> None:
        """Waits until the page has its settings."""
        ready = "document.readyState === 'complete' && document.querySelector('#faces input') !== null"
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.call("Runtime.evaluate", expression=ready)["result"].get("value"):
            assert time.monotonic() < deadline_s, "the page is not there"
            time.sleep(0.1)

    def wait(self, expression: str) -> None:
        """Waits until an expression is true."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.value(expression):
            assert time.monotonic() < deadline_s, expression
            time.sleep(0.1)

    def hide(self) -> None:
        """Opens another tab before this one."""
        self._ask("/json/new?about:blank", "PUT")
        self.wait("document.visibilityState === 'hidden'")

    def show(self) -> None:
        self._ask(f"/json/activate/{self._id}")
        self.wait("document.visibilityState === 'visible'")

    def _ask(self, path: str, method: str = "GET") -> None:
        DIRECT.open(urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", method=method)).close()


@contextmanager
def background_tab(address: str, folder: Path) -> Iterator[BackgroundTab]:
    """A tab with a page, in a browser of its own."""
    options = ("--headless", "--no-sandbox", "--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={folder}")
    browser = subprocess.Popen([str(PROGRAM), *options, "about:blank"], stderr=subprocess.DEVNULL)
    try:
        file = folder / "DevToolsActivePort"
        deadline_s = time.monotonic() + PATIENCE_S
        while not (file.exists() and file.read_text().count("\n")):
            assert time.monotonic() < deadline_s, "the browser has not started"
            time.sleep(0.1)
        port = file.read_text().split()[0]
        with DIRECT.open(f"http://127.0.0.1:{port}/json/list") as answer:
            target = next(one for one in json.load(answer) if one["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], proxy=None, max_size=None) as socket:
            tab = BackgroundTab(port, target, socket)
            tab.call("Page.navigate", url=address)
            tab.await_page()
            yield tab
    finally:
        browser.terminate()
        browser.wait()
