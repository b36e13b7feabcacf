"""A dashboard as its users start it, and a browser that looks at it."""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY = 'html[data-version]:not([data-version="0"])'
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt install chromium)")


@dataclass(frozen=True)
class Server:
    host: str
    port: int
    pid: int
    address: str
    """As the command printed it, with the token if there is one."""

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. `path` goes over the wire as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, "Host" in headers, "Accept-Encoding" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


@contextmanager
def dashboard(uri: str | Path, *knobs: str) -> Iterator[Server]:
    argv = [sys.executable, "-m", "system.cli", "dashboard", str(uri), "port=0", *knobs]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            match = re.search(r"http://(\S+?):(\d+)/\S*", line)
            if match:
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield Server(match[1], int(match[2]), process.pid, match[0])
                return
        raise AssertionError(f"the dashboard did not start: {''.join(lines)}")
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield found
        found.close()


def look(found: Browser, address: str, **context: object) -> Page:
    """The page, ready; what it complains about becomes the list `page.complaints`."""
    page = found.new_context(**context).new_page()  # pyright: ignore[reportArgumentType]
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector(READY, state="attached", timeout=30_000)
    page.complaints = complaints  # pyright: ignore[reportAttributeAccessIssue]
    return page


def number(page: Page, name: str) -> str:
    """What stands in the tile `name`, without its note."""
    return page.locator(f'[data-number="{name}"] dd').evaluate("e => e.firstChild.textContent")
