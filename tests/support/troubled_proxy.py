"""Stands before an S3 server and, while it is told to, answers errors in its place or does not answer."""

from __future__ import annotations

import socket
import threading

from tests.support.proxy import Proxy

UNAVAILABLE = "503 Slow Down", "SlowDown"
EXPIRED = "403 Forbidden", "ExpiredToken"


class TroubledProxy(Proxy):
    def __init__(self, target: int) -> None:
        self._well = threading.Event()
        self._well.set()
        self._answer: tuple[str, str] | None = None
        self._part = b""
        self.met = 0
        """Requests that met the trouble."""
        super().__init__(target)

    def fail(self, answer: tuple[str, str]) -> None:
        """Every request gets this status and error code."""
        self._answer, self._part = answer, b""
        self._well.clear()

    def hang(self, part: str) -> None:
        """Writes of objects with `part` in their name get no answer."""
        self._answer, self._part = None, part.encode()
        self._well.clear()

    def mend(self) -> None:
        self._well.set()

    def close(self) -> None:
        self.mend()
        super().close()

    def passes_request(self, data: bytes, client: socket.socket) -> bool:
        if self._well.is_set():
            return True
        if self._answer is not None:
            self.met += 1
            client.sendall(_error(*self._answer))
            return False
        first = data.partition(b"\r\n")[0]
        if first.startswith((b"PUT", b"POST")) and self._part in first:
            self.met += 1
            self._well.wait()
            return False
        return True


def _error(status: str, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
