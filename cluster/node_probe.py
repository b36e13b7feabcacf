"""What one node of a cluster measures for another: its clock, its ways to other nodes and to the store."""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from cluster.errors import MaskClipError
from cluster.store import StoreConfig, open_store

LINK_BYTES = 64 << 20
_PIECE = bytes(1 << 20)
_SECONDS = 20.0


class Clock(NamedTuple):
    """One question for the time, in seconds of the Unix clock."""

    asked: float
    """By the asking machine's clock."""
    told: float
    answered: float


def offset_of(questions: list[Clock]) -> float:
    """Seconds by which the other clock is ahead: from the fastest answer, as NTP does (RFC 5905)."""
    best = min(questions, key=lambda question: question.answered - question.asked)
    return best.told - (best.asked + best.answered) / 2


class NodeProbe:
    """Lives on one node, as a Ray actor. Failures come back as text; the asking side makes findings of it."""

    def run(self, work: Callable[..., Any], *args: Any) -> Any:
        return work(*args)

    def clock(self) -> float:
        return time.time()

    def listen(self) -> int:
        """Port on all addresses at which the next connection's bytes are taken and counted."""
        server = socket.create_server(("", 0))
        server.settimeout(_SECONDS)
        threading.Thread(target=_take, args=(server,), daemon=True).start()
        return server.getsockname()[1]

    def send(self, address: str, port: int) -> float | str:
        """MB/s of LINK_BYTES over one connection, until the other side has them all."""
        try:
            with socket.create_connection((address, port), _SECONDS) as link:
                started = time.perf_counter()
                for _ in range(LINK_BYTES // len(_PIECE)):
                    link.sendall(_PIECE)
                link.shutdown(socket.SHUT_WR)
                link.recv(1)
                return LINK_BYTES / 1e6 / (time.perf_counter() - started)
        except OSError as error:
            return f"{address}:{port}: {error}"

    def race(self, uri: str, config: StoreConfig, key: str, start: float) -> bool | str:
        """Whether this node's put-if-absent at the time `start` was told that it won."""
        try:
            store = open_store(uri, config)
            time.sleep(max(0.0, start - time.time()))
            return store.put_if_absent(key, socket.gethostname().encode())
        except MaskClipError as error:
            return str(error)

    def store_rates(self, uri: str, config: StoreConfig, stem: str, size: int) -> tuple[float, float] | str:
        """MB/s of writing and of reading one object of `size` bytes, which is deleted."""
        key = f"{stem}-{socket.gethostname()}-{threading.get_ident()}-{time.monotonic_ns()}"
        try:
            store = open_store(uri, config)
            started = time.perf_counter()
            store.put(key, bytes(size))
            written = time.perf_counter()
            store.get(key)
            read = time.perf_counter()
            store.delete(key)
        except MaskClipError as error:
            return str(error)
        return size / 1e6 / (written - started), size / 1e6 / (read - written)


def _take(server: socket.socket) -> None:
    with server:
        try:
            link, _ = server.accept()
            with link:
                while link.recv(1 << 20):
                    pass
                link.sendall(b"k")
        except OSError:
            return  # the sender says what happened
