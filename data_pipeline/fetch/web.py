"""One guarded GET: every hop is checked before it is asked for, and every body has a limit in bytes and time.

aiohttp does HTTP and TLS; this module keeps it inside the fence of `DownloadConfig`: no proxy from the
environment, no cookies, no redirect that was not looked at, no unpacking without a limit. Not from the paper.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import zlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from data_pipeline.fetch.address import AddressPolicy, AddressRefused, CheckedResolver, parse_url
from data_pipeline.fetch.download_config import PASSING_STATUSES, DownloadConfig, Refused, reason
from data_pipeline.fetch.rate import Turns, pause, retry_after

REDIRECTS = (301, 302, 303, 307, 308)
NAME_SERVICE_THREADS = 64
DNS_SECONDS = 300
IDLE_SECONDS = 1.0
"""How long an unused connection is kept for the next request to the same host. A crawl meets thousands of
hosts, and each connection that is kept is an open file."""
_NO_SUCH_NAME = {
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY") if hasattr(socket, name)
}


async def _at_once(url: URL) -> float:
    return 0.0


def _ignore(*what: object) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What one fetch wants beyond the rules that hold for all."""

    hop: Callable[[URL, bool], None] = _ignore
    """Called with each address, before it is checked; and whether it is the first of an attempt."""
    before: Callable[[URL], Awaitable[float]] = _at_once
    """Called before each request; returns the seconds to keep between two to that host, or raises Refused."""
    inspect: Callable[[aiohttp.ClientResponse], None] = _ignore
    """Called with each answer before its body is read; may raise Refused."""
    max_bytes: int
    cut: bool = False
    """Take the first max_bytes of a longer body, instead of refusing it."""
    key: int = 0
    """Spreads the pauses between attempts."""


@dataclass
class _Budget:
    """Seconds that one attempt has left."""

    left: float


class WebClient:
    """GETs within the limits of `config`. Belongs to one event loop; close it there."""

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        self._policy = AddressPolicy(config)
        self._turns = Turns(config.concurrency, config.per_host, config.per_host_rate, config.retry_after_cap)
        asyncio.get_running_loop().set_default_executor(
            ThreadPoolExecutor(min(config.concurrency, NAME_SERVICE_THREADS), "maskclip-dns")
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # Turns has the limits
                resolver=CheckedResolver(self._policy.refusal),
                socket_factory=self._policy.open_socket,
                ttl_dns_cache=DNS_SECONDS,
                keepalive_timeout=IDLE_SECONDS,
            ),
            headers={"User-Agent": config.agent, "Accept": "*/*", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            middlewares=(_one_request,),
            trust_env=False,
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def get(self, address: str, visit: Visit) -> bytes:
        """The body of `address`, after as many attempts as the cause of each failure deserves.

        Raises:
            Refused: of the last attempt.
        """
        config = self._config
        for attempt in range(config.retries + 1):
            try:
                return await self._attempt(parse_url(address), visit)
            except Refused as refused:
                asked = refused.retry_after or 0.0
                last = attempt == config.retries or asked > config.retry_after_cap
                if last or not reason(refused.word).again:
                    raise
                wait = max(asked, pause(attempt, config.backoff_base, config.backoff_cap, visit.key))
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, url: URL, visit: Visit) -> bytes:
        """Follow the redirects from `url` to a body."""
        budget = _Budget(self._config.total_timeout)
        for number in range(self._config.max_redirects + 1):
            visit.hop(url, number == 0)
            self._policy.check_url(url, self._config.schemes)
            interval = await visit.before(url)
            async with self._turns.turn(str(url.raw_host), interval):
                answer = await self._exchange(url, visit, budget)
            if isinstance(answer, bytes):
                return answer
            url = parse_url(answer, base=url)
        raise Refused("too_many_redirects", f"more than {self._config.max_redirects} redirects")

    async def _exchange(self, url: URL, visit: Visit, budget: _Budget) -> bytes | str:
        """One request: the body, or the address that the answer sends us to."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        timeout = aiohttp.ClientTimeout(
            total=max(budget.left, 0.001),
            connect=self._config.connect_timeout,
            sock_read=self._config.read_timeout,
        )
        try:
            async with self._session.get(url, allow_redirects=False, timeout=timeout) as response:
                return await self._read(response, url, visit)
        except Refused:
            raise
        except (TimeoutError, aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            raise _refusal(error, url) from None
        finally:
            budget.left -= loop.time() - begun

    async def _read(self, response: aiohttp.ClientResponse, url: URL, visit: Visit) -> bytes | str:
        """The body of an answer of status 200 or, of a redirect, where to."""
        status, headers = response.status, response.headers
        visit.inspect(response)
        if status in REDIRECTS and "Location" in headers:
            return headers["Location"]
        if status != 200:
            busy = status in PASSING_STATUSES
            asked = retry_after(headers.get("Retry-After")) if busy else None
            if asked is not None:
                self._turns.hold_back(str(url.raw_host), asked)
            raise Refused(f"http_{status}", f"from {url.raw_host}", asked)
        packing = headers.get("Content-Encoding", "identity").strip().lower()
        if packing not in ("", "identity", "gzip", "x-gzip"):
            raise Refused("encoding_refused", f"Content-Encoding {packing[:40]!r}")
        if not visit.cut and (response.content_length or 0) > visit.max_bytes:
            raise Refused("too_large", f"{response.content_length} bytes are more than {visit.max_bytes}")
        received = bytearray()
        async for part in response.content.iter_any():
            received += part
            if len(received) > visit.max_bytes:
                break
        body = unpack(bytes(received), visit.max_bytes) if "gzip" in packing else bytes(received)
        if len(body) > visit.max_bytes and not visit.cut:
            raise Refused("too_large", f"more than {visit.max_bytes} bytes")
        return body[: visit.max_bytes]


async def _one_request(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Send one request and no more: aiohttp would at once send a second one for a connection that broke, past
    our limits and pauses, if it saw these errors."""
    try:
        return await handler(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _refusal(error, request.url) from None


def unpack(packed: bytes, max_bytes: int) -> bytes:
    """Gunzip the first `max_bytes` + 1 bytes and no more. Raises Refused "truncated" where there are fewer
    and the end is missing."""
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        body = unpacker.decompress(packed, max_bytes + 1)
    except zlib.error:
        raise Refused("truncated", "the body is not gzip, or damaged") from None
    if not unpacker.eof and len(body) <= max_bytes:
        raise Refused("truncated", "the gzip body ends before its end")
    return body


def _refusal(error: Exception, url: URL) -> Refused:
    """The word for an error of aiohttp. Details name causes, not times or addresses that differ by chance."""
    where = f"{url.raw_host}:{url.port}"
    if isinstance(error, aiohttp.ClientSSLError):
        return Refused("tls_failed", f"{where}: {type(error).__name__}")
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, AddressRefused):
        return Refused("private_address", str(cause.strerror))
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        unknown = isinstance(cause, socket.gaierror) and cause.errno in _NO_SUCH_NAME
        return Refused("unknown_host" if unknown else "dns_failed", str(url.raw_host))
    if isinstance(error, asyncio.TimeoutError):
        kinds = {aiohttp.ConnectionTimeoutError: "connect", aiohttp.SocketTimeoutError: "read"}
        return Refused("timeout", f"download.{kinds.get(type(error), 'total')}_timeout")
    if isinstance(error, aiohttp.ClientPayloadError):
        return Refused("truncated", "the connection ended before the body did")
    if isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        return Refused("bad_response", f"{where}: {type(error).__name__}")
    if isinstance(error, aiohttp.InvalidURL):
        return Refused("bad_url", "the address cannot be asked for")
    if isinstance(error, aiohttp.ClientConnectionError | OSError):
        code = cause.errno if isinstance(cause, OSError) else None
        name = errno.errorcode.get(code, "") if code else ""
        return Refused("connection_failed", f"{where}: {name or type(error).__name__}")
    return Refused("bad_response", f"{where}: {type(error).__name__}")
