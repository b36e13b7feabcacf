"""A server on this machine that plays the web, its bad sides included: what is slow, endless, cut or a lie.

It writes HTTP by hand on asyncio streams, because a library would not send what a broken server sends. It
listens on several loopback addresses, so that one of them can be allowed and another not, and counts what it
sees: every request, and how many were in work at once.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
Pairs = Iterable[tuple[str, str]]


@dataclass
class Exchange:
    """One request and the stream to answer it on."""

    host: str  # the address that was connected to
    path: str
    headers: dict[str, str]
    writer: asyncio.StreamWriter
    count: int  # requests for this path so far, this one included

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: int = 200, headers: Pairs = ()) -> None:
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers)]
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))


# Answers one request. Returns whether the connection may serve another.
Page = Callable[[Exchange], Awaitable[bool]]


@dataclass
class WebServer:
    """`pages` maps a path, or host + path, to what answers it; others are 404. Use as a context manager."""

    pages: dict[str, Page] = field(default_factory=dict)
    requests: list[Exchange] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    most: int = 0
    most_per_host: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> WebServer:
        self._now: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def url(self, path: str, host: str = "127.0.0.2") -> str:
        return f"http://{host}:{self.port}{path}"

    def seen(self, path: str, host: str | None = None) -> int:
        """How often a path was asked for."""
        return sum(r.path == path and host in (None, r.host) for r in self.requests)

    async def _listen(self) -> int:
        first = await asyncio.start_server(self._serve, HOSTS[0], 0)
        port = first.sockets[0].getsockname()[1]
        self._servers = [first, *[await asyncio.start_server(self._serve, host, port) for host in HOSTS[1:]]]
        return port

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = writer.get_extra_info("sockname")[0]
        self.connections += 1
        self.open_connections += 1
        try:
            while await self._one(host, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the server ends
        finally:
            self.open_connections -= 1
            writer.close()

    async def _one(self, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        start = await reader.readexactly(1)
        if start == b"\x16":  # the first byte of TLS
            writer.write(b"HTTP/1.1 400 no TLS here\r\n\r\n")
            return False
        lines = (start + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        path = lines[0].split(" ")[1]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        exchange = Exchange(host, path, headers, writer, self.seen(path) + 1)
        self.requests.append(exchange)
        self.times.append(time.monotonic())
        self._now[host] += 1
        self.most = max(self.most, self._now.total())
        self.most_per_host[host] = max(self.most_per_host[host], self._now[host])
        try:
            answer = self.pages.get(host + path) or self.pages.get(path) or page(b"", 404)
            return await answer(exchange) and headers.get("connection") != "close"
        finally:
            self._now[host] -= 1


def page(body: bytes, status: int = 200, headers: Pairs = ()) -> Page:
    """An honest answer."""

    async def answer(exchange: Exchange) -> bool:
        await exchange.head(status, [("Content-Length", str(len(body))), *headers])
        await exchange.send(body)
        return True

    return answer


def redirect(to: str, status: int = 302) -> Page:
    return page(b"go on", status, [("Location", to)])


def in_turn(*pages: Page) -> Page:
    """The first request gets the first page, and so on; the last page stays."""

    async def answer(exchange: Exchange) -> bool:
        return await pages[min(exchange.count, len(pages)) - 1](exchange)

    return answer


def slowly(seconds: float, then: Page) -> Page:
    async def answer(exchange: Exchange) -> bool:
        await asyncio.sleep(seconds)
        return await then(exchange)

    return answer


async def drip(exchange: Exchange) -> bool:
    """A byte now and then, never all of them: no read times out."""
    await exchange.head(200, [("Content-Length", "100000")])
    while True:
        await exchange.send(b".")
        await asyncio.sleep(0.02)


async def stall(exchange: Exchange) -> bool:
    """The beginning of a body, then nothing."""
    await exchange.head(200, [("Content-Length", "100000")])
    await exchange.send(b"some")
    await asyncio.sleep(60)
    return False


async def endless(exchange: Exchange) -> bool:
    """Bytes until the client hangs up, and no word on how many."""
    await exchange.head(200, [("Connection", "close")])
    while True:
        await exchange.send(bytes(65536))


def claims(length: int, body: bytes) -> Page:
    """A Content-Length that is not the length of the body."""

    async def answer(exchange: Exchange) -> bool:
        await exchange.head(200, [("Content-Length", str(length))])
        await exchange.send(body)
        return len(body) >= length

    return answer


async def cut_chunks(exchange: Exchange) -> bool:
    """A chunked body without its last chunk."""
    await exchange.head(200, [("Transfer-Encoding", "chunked")])
    await exchange.send(b"5\r\nhello\r\n")
    return False


async def reset(exchange: Exchange) -> bool:
    """RST instead of an answer."""
    exchange.writer.get_extra_info("socket").setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    exchange.writer.transport.abort()
    return False


async def huge_header(exchange: Exchange) -> bool:
    await exchange.head(200, [("X-Long", "x" * 100_000), ("Content-Length", "0")])
    return False


async def no_http(exchange: Exchange) -> bool:
    await exchange.send(b"220 mail.example ESMTP\r\n")
    return False


def bomb(megabytes: int) -> Page:
    """A small gzip body that unpacks to `megabytes` MiB of zeros, sent although nobody asked for gzip."""
    return page(gzip.compress(bytes(megabytes * 2**20), 9), headers=[("Content-Encoding", "gzip")])
