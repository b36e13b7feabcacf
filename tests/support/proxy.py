"""A proxy for one server on this machine, over real sockets. What goes wrong is up to who derives from it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

Passes = Callable[[bytes, socket.socket], bool]


class Proxy:
    def __init__(self, target: int) -> None:
        """
        Args:
            target: port of the server on this machine.
        """
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                for source, sink, passes in (
                    (client, server, self.passes_request),
                    (server, client, self.passes_answer),
                ):
                    threading.Thread(target=self._pump, args=(source, sink, passes), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, passes: Passes) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(1 << 16):
                if not passes(data, source):
                    break
                sink.sendall(data)
            for end in (source, sink):
                end.shutdown(socket.SHUT_RDWR)

    def passes_request(self, data: bytes, client: socket.socket) -> bool:
        """Whether to hand it on; otherwise the connection is closed."""
        return True

    def passes_answer(self, data: bytes, server: socket.socket) -> bool:
        """As `passes_request`."""
        return True
