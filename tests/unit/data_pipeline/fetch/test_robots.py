"""What owners ask of robots is understood, and asked for once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from data_pipeline.fetch.robots import MOST_ROBOTS_BYTES, Robots, RobotsCache, opt_outs, parse_robots

SITE = URL("https://example.com")
TEXT = b"""\xef\xbb\xbf# with a byte order mark
User-agent: *
Disallow: /private/
Allow: /private/open
Disallow: /*.gif$
Disallow: /find?*q=
Crawl-delay: 3

User-agent: MaskCLIP
Disallow: /not-for-us
Request-rate: 1/20

User-agent: otherbot
Disallow: /
"""


def allowed(path: str, agent: str, text: bytes = TEXT) -> bool:
    return parse_robots(text).allows(SITE.join(URL(path)), agent)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a.jpg", True),
        ("/private/a.jpg", False),
        ("/private/open.jpg", True),  # the longer rule wins, wherever it stands
        ("/a.gif", False),
        ("/a.gif?x=1", True),
        ("/find?p=1&q=2", False),
        ("/not-for-us/a.jpg", True),
        ("/%70rivate/a.jpg", False),
    ],
)
def test_rules_for_everybody(path: str, expected: bool):
    assert allowed(path, "somebody") is expected


def test_a_group_of_our_own_replaces_that_for_everybody():
    assert allowed("/private/a.jpg", "maskclip")
    assert not allowed("/not-for-us/a.jpg", "maskclip")
    assert not allowed("/a.jpg", "otherbot")


def test_crawl_delay_and_request_rate_up_to_a_cap():
    robots = parse_robots(TEXT)
    assert robots.interval("somebody", cap=10) == 3
    assert robots.interval("somebody", cap=2) == 2
    assert robots.interval("maskclip", cap=60) == 20
    assert robots.interval("otherbot", cap=60) == 0
    assert parse_robots(b"User-agent: *\nCrawl-delay: soon").interval("x", cap=9) == 0


@given(st.binary(max_size=400) | st.text("ua: *\n\r/$%ser-agnt dilow", max_size=400).map(str.encode))
@settings(deadline=None)
def test_nothing_in_a_robots_txt_raises(body: bytes):
    robots = parse_robots(body)
    assert robots.answer == "allowed"
    assert robots.allows(SITE / "a.jpg", "maskclip") in (True, False)
    assert 0 <= robots.interval("maskclip", cap=5) <= 5


def test_an_html_page_in_its_place_forbids_nothing():
    assert allowed("/a.jpg", "maskclip", b"<!DOCTYPE html><html><body>Not found: /</body></html>")


def test_what_lies_beyond_the_limit_is_not_read():
    rule = b"User-agent: *\nDisallow: /\n"
    assert not allowed("/a.jpg", "maskclip", b"#" * (MOST_ROBOTS_BYTES - len(rule) - 1) + b"\n" + rule)
    assert allowed("/a.jpg", "maskclip", b"#" * MOST_ROBOTS_BYTES + b"\n" + rule)


def test_a_robots_txt_that_multiplies_its_rules_is_not_parsed():
    agents = b"".join(b"User-agent: a%d\n" % n for n in range(5000))
    rules = b"".join(b"Disallow: /%d\n" % n for n in range(5000))
    robots = parse_robots(agents + rules)
    assert (robots.answer, robots.rules) == ("disallowed", None)
    assert not robots.allows(SITE / "a.jpg", "maskclip")


def test_a_long_list_of_banned_robots_is_parsed():
    listed = b"".join(b"User-agent: bad%d\nDisallow: /\n" % n for n in range(5000))
    assert parse_robots(listed).answer == "allowed"
    grouped = b"".join(b"User-agent: bad%d\n" % n for n in range(3000)) + b"Disallow: /\n"
    assert allowed("/a.jpg", "maskclip", grouped)
    assert not allowed("/a.jpg", "bad7", grouped)


@pytest.mark.parametrize(
    ("answer", "expected"), [("none", True), ("disallowed", False), ("unreachable", False)]
)
def test_without_rules_the_answer_decides(answer, expected: bool):
    assert Robots(answer).allows(SITE, "maskclip") is expected


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ([], set()),
        (["noai"], {"noai"}),
        (["NoAI, NoImageAI"], {"noai", "noimageai"}),
        (["noindex", "noai"], {"noindex", "noai"}),
        (["googlebot: noindex, nofollow"], set()),
        (["googlebot: noindex", "noai"], {"noai"}),
        (["noai, googlebot: noindex"], {"noai"}),
        (["googlebot: noindex, maskclip: noai"], {"noai"}),
        (["MaskCLIP: noindex"], {"noindex"}),
        (["*: noindex"], {"noindex"}),
        (["max-snippet: 20, noai"], {"max-snippet", "noai"}),
        (["max-image-preview: none, noai"], {"max-image-preview", "noai"}),
        (["unavailable_after: Wed, 25 Jun 2025 15:00:00 GMT, noai"], None),
        (["none"], {"none", "noindex", "nofollow"}),
        (["googlebot: none"], set()),
        ([" , ,"], {""}),
    ],
)
def test_words_of_x_robots_tag(headers: list[str], words: set[str] | None):
    found = opt_outs(headers, "maskclip")
    assert found == words if words is not None else "noai" in found


class Origin:
    """Counts how often the robots.txt of each host is fetched."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.gate = asyncio.Event()

    async def fetch(self, url: URL) -> Robots:
        self.fetched.append(str(url))
        await self.gate.wait()
        return Robots("none")


def test_each_origin_is_asked_once_whoever_waits():
    async def run() -> list[str]:
        origin = Origin()
        cache = RobotsCache(origin.fetch, size=8)
        urls = [URL(f"http://{host}/{n}") for n in range(5) for host in ("a.org", "a.org:81", "b.org")]
        waiting = [asyncio.create_task(cache.get(url)) for url in urls]
        await asyncio.sleep(0)
        waiting[0].cancel()  # who began the fetch goes away; the others get their answer
        await asyncio.sleep(0)
        origin.gate.set()
        answers = await asyncio.gather(*waiting[1:])
        assert {robots.answer for robots in answers} == {"none"}
        await cache.get(URL("http://a.org/later"))
        return origin.fetched

    assert sorted(asyncio.run(run())) == [
        "http://a.org/robots.txt",
        "http://a.org:81/robots.txt",
        "http://b.org/robots.txt",
    ]


def test_the_cache_keeps_the_origins_used_last():
    async def run() -> list[str]:
        origin = Origin()
        origin.gate.set()
        cache = RobotsCache(origin.fetch, size=2)
        for host in ("a", "b", "a", "c", "a", "b"):
            await cache.get(URL(f"http://{host}/"))
        return [str(URL(url).host) for url in origin.fetched]

    assert asyncio.run(run()) == ["a", "b", "c", "b"]
