"""What the owner of a host asks of robots: robots.txt (RFC 9309) and the X-Robots-Tag header.

robots.txt is read by Protego (BSD), the parser of Scrapy: the longest rule wins and `*` and `$` are
understood, as RFC 9309 wants. `urllib.robotparser` of the standard library takes the first rule that fits and
knows no `*` before Python 3.15. Not from the paper.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from protego import Protego
from yarl import URL

from data_pipeline.fetch.download_config import Refused

MOST_ROBOTS_BYTES = 500 * 1024
"""RFC 9309: at least this much of a robots.txt must be read. What lies beyond is not."""
MOST_STEPS = 1_000_000
"""A robots.txt whose groups need more rule entries than this (agents of a group x its rules) is not read."""

Answer = Literal["allowed", "none", "disallowed", "unreachable", "off"]

_AGENT_LINE = re.compile(r"\s*user\W*agent", re.IGNORECASE)
_AGENT_NAME = re.compile(r"[\w.*/-]+")
# X-Robots-Tag rules that take a value after a colon, where others have the name of a robot before one.
_RULES_WITH_VALUE = frozenset(
    {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after", "indexifembedded"}
)


@dataclass(frozen=True)
class Robots:
    """What is known of one origin's robots.txt."""

    answer: Answer
    """none: there is no robots.txt. allowed: there is one, ask `allows`. disallowed, unreachable: no address
    of this origin may be fetched."""
    rules: Protego | None = None
    cause: Refused | None = None
    """Why it is unreachable."""

    def allows(self, url: URL, agent: str) -> bool:
        """Whether `agent` may fetch `url`."""
        if self.rules is None:
            return self.answer == "none"
        return self.rules.can_fetch(str(url), agent)

    def interval(self, agent: str, cap: float) -> float:
        """Seconds between two requests that Crawl-delay and Request-rate ask for, at most `cap`."""
        if self.rules is None:
            return 0.0
        rate = self.rules.request_rate(agent)
        between = 0.0 if rate is None else rate.seconds / rate.requests
        return min(cap, max(self.rules.crawl_delay(agent) or 0.0, between))


def parse_robots(body: bytes) -> Robots:
    """Read a robots.txt; whatever is no rule in it is skipped. Never raises."""
    text = body[:MOST_ROBOTS_BYTES].decode("utf-8-sig", "replace")
    if _steps(text) > MOST_STEPS:
        return Robots("disallowed")
    return Robots("allowed", Protego.parse(text))


def _steps(text: str) -> int:
    """How much work and memory the parser will need: every rule of a group is kept for each of its agents, so
    that half a megabyte can ask for 10^8 of them."""
    total = agents = rules = 0
    for line in text.splitlines():
        if _AGENT_LINE.match(line):
            if rules:
                agents = rules = 0
            agents += 1
            total += agents // 64  # an agent is looked for among those before it, which is quick
        elif line.strip():
            rules += 1
            total += agents
    return total


class RobotsCache:
    """The robots.txt of the origins met last; each is fetched once, whoever asks meanwhile waits for it.

    `fetch` gets the address of a robots.txt and returns what it says; it never raises but when cancelled.
    """

    def __init__(self, fetch: Callable[[URL], Awaitable[Robots]], size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._known: OrderedDict[URL, asyncio.Future[Robots]] = OrderedDict()

    async def get(self, url: URL) -> Robots:
        """What the robots.txt of the origin of `url` says."""
        origin = url.origin()
        if origin in self._known:
            self._known.move_to_end(origin)
        else:
            self._known[origin] = asyncio.ensure_future(self._fetch(origin.with_path("/robots.txt")))
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        # Shielded: who waits may be cancelled, the others still want the answer.
        return await asyncio.shield(self._known[origin])


def opt_outs(headers: Iterable[str], agent: str) -> set[str]:
    """Words of all X-Robots-Tag headers of a response that concern `agent`, in lower case.

    A word belongs to the robot whose name and colon stand before it in the same header, and to everybody
    where there is none. `none` is `noindex` and `nofollow`.
    """
    words: set[str] = set()
    for header in headers:
        scope = None
        for part in header.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if colon and name not in _RULES_WITH_VALUE and _AGENT_NAME.fullmatch(name):
                scope, name = name, rest
            if scope in (None, "*", agent.lower()):
                words.add(name)
    return words | {"noindex", "nofollow"} if "none" in words else words
