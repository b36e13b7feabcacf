"""Bounded, polite and safe fetching of the images of rows that have only an address.

`fetch_rows` reads rows and gives them back in the same order, each with its image or as a reject with its
reason; `docs/download.md` has the table of what is checked and what is stored. Requests run on an event loop
in a thread of its own, so that they go on while the caller decodes. Not from the paper.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from aiohttp import ClientResponse
from yarl import URL

from data_pipeline.fetch.download_config import (
    OPT_OUT_TAGS,
    REASONS,
    DownloadConfig,
    Reason,
    Refused,
    reason,
)
from data_pipeline.fetch.robots import MOST_ROBOTS_BYTES, Answer, Robots, RobotsCache, opt_outs, parse_robots
from data_pipeline.fetch.web import Visit, WebClient
from data_pipeline.records import Reject, SourceRow, sample_id

__all__ = ["OPT_OUT_TAGS", "REASONS", "DownloadConfig", "Reason", "fetch_rows", "reason"]

MOST_HEADER_CHARACTERS = 300
# Causes that robots.txt and the image of the same host share; they say more than "robots.txt is unreachable".
_SHARED_CAUSES = ("unknown_host", "dns_failed", "private_address")
T = TypeVar("T")


@dataclass
class Trail:
    """What the last attempt met: stored with the row, and the same in every run that meets the same web."""

    status: int | None = None
    """Of the last answer: that of the redirect, where the address it leads to was refused."""
    final_url: str | None = None
    """The last address that was looked at, whether it was asked for or refused."""
    content_type: str | None = None
    robots: Answer | None = None
    """For the last address; None when it did not come to that."""
    x_robots_tag: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Fetcher:
    """Fetches rows by one client. Made, used and closed on one event loop."""

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        self._client = WebClient(config)
        self._robots = RobotsCache(self._fetch_robots, config.robots_cache_size)

    async def fetch(self, row: SourceRow) -> SourceRow | Reject:
        """`row` with its image, or why there is none."""
        trail = Trail(final_url=row.url)

        def hop(url: URL, first: bool) -> None:
            if first:
                trail.status = trail.content_type = trail.x_robots_tag = None
            trail.final_url, trail.robots = str(url), None

        async def before(url: URL) -> float:
            robots = await self._ask(url, trail)
            return robots.interval(self._config.user_agent, self._config.crawl_delay_cap)

        def inspect(response: ClientResponse) -> None:
            trail.status, trail.x_robots_tag = response.status, None
            content_type = response.headers.get("Content-Type")
            trail.content_type = content_type and content_type[:MOST_HEADER_CHARACTERS]
            self._check_tags(response.status, response.headers.getall("X-Robots-Tag", []), trail)

        visit = Visit(
            hop=hop,
            before=before,
            inspect=inspect,
            max_bytes=self._config.max_bytes,
            key=sample_id(row.source),
        )
        try:
            image = await self._client.get(row.url or "", visit)
            if not image:
                raise Refused("empty_body", "status 200 with no bytes")
        except Refused as refused:
            seen = replace(row, fetch=trail.as_dict())
            return Reject.of(seen, refused.word, refused.detail, reason(refused.word).retriable)
        return replace(row, image=image, fetch=trail.as_dict())

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def _ask(self, url: URL, trail: Trail) -> Robots:
        """What robots.txt says to `url`; Refused where that is no."""
        if not self._config.respect_robots_txt:
            trail.robots = "off"
            return Robots("none")
        robots = await self._robots.get(url)
        trail.robots = robots.answer
        if robots.cause is not None:
            if robots.cause.word in _SHARED_CAUSES:
                trail.robots = None
                raise Refused(robots.cause.word, robots.cause.detail)
            raise Refused("robots_unreachable", str(robots.cause))
        if not robots.allows(url, self._config.user_agent):
            trail.robots = "disallowed"
            raise Refused("robots_disallowed", f"by the robots.txt of {url.origin()}")
        return robots

    async def _fetch_robots(self, url: URL) -> Robots:
        """Fetch and read one robots.txt, through the same fence as images."""
        host = url.raw_host

        def hop(to: URL, first: bool) -> None:
            nonlocal host
            host = to.raw_host

        visit = Visit(hop=hop, max_bytes=MOST_ROBOTS_BYTES, cut=True, key=sample_id(str(url)))
        try:
            return parse_robots(await self._client.get(str(url), visit))
        except Refused as refused:
            if refused.word.startswith("http_4") and not reason(refused.word).again:
                return Robots("none")
            if refused.word in _SHARED_CAUSES and host != url.raw_host:  # after a redirect
                refused = Refused("robots_unreachable", f"it redirects to another host: {refused}")
            return Robots("unreachable", cause=refused)

    def _check_tags(self, status: int, headers: list[str], trail: Trail) -> None:
        """Note the X-Robots-Tag headers of an answer; Refused where they opt out."""
        if not headers:
            return
        trail.x_robots_tag = ", ".join(headers)[:MOST_HEADER_CHARACTERS]
        if not self._config.respect_x_robots_tag or status >= 400:
            return
        words = opt_outs(headers, self._config.user_agent)
        for tag in self._config.x_robots_tags:
            if tag.lower() in words:
                raise Refused(f"tag_{tag.lower()}", "by the X-Robots-Tag header")


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="maskclip-download", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel what runs, then run `last`, and end the thread."""
        self.submit(self._cancel_all()).result()
        self.submit(last()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()  # without waiting for a name service that does not answer

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def fetch_rows(rows: Iterable[SourceRow | Reject], config: DownloadConfig) -> Iterator[SourceRow | Reject]:
    """Fetch the images of `rows` that have a url and no image; the others, and rejects, pass as they are.

    Yields one result per row, in the order of `rows`. At most `config.look_ahead` x `config.concurrency` rows
    are in work or wait for a slower one before them; `rows` is read in the caller's thread. Closing the
    generator cancels what runs and closes every connection. A row that cannot be fetched is a Reject whose
    reason is one of REASONS; exceptions come from `rows` only.
    """
    loop = _Loop()
    waiting: deque[SourceRow | Reject | Future[SourceRow | Reject]] = deque()
    buffered = _Buffered()
    fetcher = None
    try:
        fetcher = loop.submit(_open(config)).result()
        source = iter(rows)
        more = True
        while more or waiting:
            while more and len(waiting) < config.look_ahead * config.concurrency:
                if waiting and buffered.size >= config.buffer_bytes:
                    break
                row = next(source, None)
                if row is None:
                    more = False
                elif isinstance(row, SourceRow) and row.url is not None and row.image is None:
                    work = loop.submit(fetcher.fetch(row))
                    work.add_done_callback(buffered.add)
                    waiting.append(work)
                else:
                    waiting.append(row)
            if waiting:
                first = waiting.popleft()
                if isinstance(first, Future):
                    result = first.result()
                    buffered.remove(first)
                    yield result
                else:
                    yield first
    finally:
        loop.stop(fetcher.close if fetcher is not None else _nothing)


class _Buffered:
    """Bytes of images that are there and not yet taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.size = 0

    def add(self, work: Future[SourceRow | Reject]) -> None:
        self._count(work, 1)

    def remove(self, work: Future[SourceRow | Reject]) -> None:
        self._count(work, -1)

    def _count(self, work: Future[SourceRow | Reject], sign: int) -> None:
        result = None if work.cancelled() or work.exception() else work.result()
        if isinstance(result, SourceRow) and result.image is not None:
            with self._lock:
                self.size += sign * len(result.image)


async def _open(config: DownloadConfig) -> Fetcher:
    return Fetcher(config)


async def _nothing() -> None:
    return None
