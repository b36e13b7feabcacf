"""Stands before an S3 server and, while it is told to, answers errors in its place or does not answer."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

UNAVAILABLE = "503 Slow Down", "SlowDown"
EXPIRED = "403 Forbidden", "ExpiredToken"


class TroubledProxy:
    def __init__(self, target: int) -> None:
        """
        Args:
            target: port of the server on this machine.
        """
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._well = threading.Event()
        self._well.set()
        self._answer: tuple[str, str] | None = None
        self._part = b""
        self.met = 0
        """Requests that met the trouble."""
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

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
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError), client, server:
            while data := client.recv(1 << 16):
                first = data.partition(b"\r\n")[0]
                if not self._well.is_set():
                    if self._answer is not None:
                        self.met += 1
                        client.sendall(_error(*self._answer))
                        break
                    if first.startswith((b"PUT", b"POST")) and self._part in first:
                        self.met += 1
                        self._well.wait()
                        break
                server.sendall(data)
            for end in (client, server):
                end.shutdown(socket.SHUT_RDWR)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


def _error(status: str, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
