"""Each address ends as it should, with its reason stored; and nobody is asked more often than agreed."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.fetch.download import OPT_OUT_TAGS, REASONS, reason
from data_pipeline.fetch.web import unpack
from data_pipeline.records import Reject, SourceRow
from tests.support import web_server as web
from tests.support.paths import ROOT
from tests.support.web_rows import CONFIG, FETCH, IMAGE, IMPATIENT, fetch, fetch_all, rejected, row
from tests.support.web_server import Exchange, Page, WebServer, in_turn, page, redirect, slowly


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer({"/image": page(IMAGE)}) as server:
        yield server


# page, reason, requests; the reason "" stands for an image that is kept
FATES: dict[str, tuple[Page, str, int]] = {
    "/image": (page(IMAGE), "", 1),
    "/redirect": (redirect("/target"), "", 1),
    "/redirect-303": (redirect("../target", 303), "", 1),
    "/redirect-308": (redirect("//127.0.0.3:{port}/target", 308), "", 1),
    "/busy-then-well": (in_turn(page(b"", 503), page(IMAGE)), "", 2),
    "/too-many-then-well": (in_turn(page(b"", 429, [("Retry-After", "0")]), page(IMAGE)), "", 2),
    "/reset-then-well": (in_turn(web.reset, page(IMAGE)), "", 2),
    "/cut-then-well": (in_turn(web.claims(500, IMAGE), page(IMAGE)), "", 2),
    "/gzip": (page(gzip.compress(IMAGE), headers=[("Content-Encoding", "gzip")]), "", 1),
    "/other-robot": (page(IMAGE, headers=[("X-Robots-Tag", "googlebot: noai")]), "", 1),
    "/nofollow": (page(IMAGE, headers=[("X-Robots-Tag", "nofollow")]), "", 1),
    "/to-loopback": (redirect("http://127.0.0.1:{port}/image"), "private_address", 1),
    "/to-loopback-name": (redirect("http://localhost:{port}/image"), "private_address", 1),
    "/to-decimal": (redirect("http://2130706433:{port}/image"), "private_address", 1),
    "/to-metadata": (redirect("http://169.254.169.254/latest/"), "private_address", 1),
    "/to-file": (redirect("file:///etc/hostname"), "scheme_refused", 1),
    "/to-ftp": (redirect("ftp://127.0.0.2/image"), "scheme_refused", 1),
    "/to-nonsense": (redirect("http://[::1/"), "bad_url", 1),
    "/to-user": (redirect("http://user:secret@127.0.0.2:{port}/image"), "bad_url", 1),
    "/loop": (redirect("/loop"), "too_many_redirects", 4),
    "/no-location": (page(b"", 302), "http_302", 1),
    "/endless": (web.endless, "too_large", 1),
    "/announces-too-much": (web.claims(10**9, b""), "too_large", 1),
    "/large": (page(bytes(100_001)), "too_large", 1),
    "/just-fits": (page(bytes(100_000)), "", 1),
    "/bomb": (web.bomb(64), "too_large", 1),
    "/short": (web.claims(100, IMAGE), "truncated", 2),
    "/cut-chunks": (web.cut_chunks, "truncated", 2),
    "/cut-gzip": (page(gzip.compress(IMAGE)[:-5], headers=[("Content-Encoding", "gzip")]), "truncated", 2),
    "/packed-just-fits": (page(gzip.compress(bytes(100_000)), headers=[("Content-Encoding", "gzip")]), "", 1),
    "/brotli": (page(IMAGE, headers=[("Content-Encoding", "br")]), "encoding_refused", 1),
    "/twice-packed": (page(IMAGE, headers=[("Content-Encoding", "gzip, gzip")]), "encoding_refused", 1),
    "/empty": (page(b""), "empty_body", 1),
    "/partial": (page(IMAGE, 206), "http_206", 1),
    "/forbidden": (page(b"", 403), "http_403", 1),
    "/gone": (page(b"", 410), "http_410", 1),
    "/gone-for-long": (page(b"", 410, [("Retry-After", "9999")]), "http_410", 1),  # concerns no other row
    "/missing": (page(b"", 404), "http_404", 1),
    "/missing-tagged": (page(b"", 404, [("X-Robots-Tag", "noai")]), "http_404", 1),
    "/too-many": (page(b"", 429), "http_429", 2),
    **{f"/busy-{n}": (page(b"", n), f"http_{n}", 2) for n in (408, 425, 500, 502, 503, 504)},
    "/not-implemented": (page(b"", 501), "http_501", 1),
    "/reset": (web.reset, "connection_failed", 2),
    "/huge-header": (web.huge_header, "bad_response", 2),
    "/no-http": (web.no_http, "bad_response", 2),
    **{
        f"/tag-{tag}": (page(IMAGE, headers=[("X-Robots-Tag", tag)]), f"tag_{tag}", 1) for tag in OPT_OUT_TAGS
    },
    "/tag-none": (page(IMAGE, headers=[("X-Robots-Tag", "none")]), "tag_noindex", 1),
    "/tag-ours": (page(IMAGE, headers=[("X-Robots-Tag", "other: noai, maskclip: noai")]), "tag_noai", 1),
    "/tag-redirect": (page(b"", 302, [("Location", "/target"), ("X-Robots-Tag", "noai")]), "tag_noai", 1),
}


def at(port: int, answer: Page) -> Page:
    """The page with the port of the server in its redirect."""

    async def filled(exchange: Exchange) -> bool:
        send = exchange.send

        async def with_port(data: bytes) -> None:
            await send(data.replace(b"{port}", str(port).encode()))

        exchange.send = with_port  # type: ignore[method-assign]
        return await answer(exchange)

    return filled


@pytest.fixture(scope="module")
def fates() -> Iterator[tuple[WebServer, dict[str, SourceRow | Reject]]]:
    """All pages fetched in one call, because they must not disturb each other either."""
    with WebServer({"/target": page(IMAGE)}) as server:
        server.pages |= {path: at(server.port, answer) for path, (answer, _, _) in FATES.items()}
        results = fetch_all([server.url(path) for path in FATES])
        yield server, dict(zip(FATES, results, strict=True))


@pytest.mark.parametrize("path", FATES)
def test_fate(fates: tuple[WebServer, dict[str, SourceRow | Reject]], path: str):
    server, results = fates
    _, expected, requests = FATES[path]
    result = results[path]
    assert (result.reason if isinstance(result, Reject) else "") == expected
    assert server.seen(path) == requests
    assert result.url == server.url(path)
    assert result.fetch is not None
    assert list(result.fetch) == ["status", "final_url", "content_type", "robots", "x_robots_tag"]
    if isinstance(result, SourceRow):
        assert result.image == (bytes(100_000) if "just-fits" in path else IMAGE)
    else:
        assert result.retriable == reason(expected).retriable
        assert result.detail


def test_nothing_was_asked_of_the_address_that_is_refused(fates: tuple[WebServer, dict]):
    server, _ = fates
    assert [request.path for request in server.requests if request.host == "127.0.0.1"] == []


def test_a_bomb_is_not_unpacked():
    packed = gzip.compress(bytes(64 * 2**20))
    tracemalloc.start()
    assert unpack(packed, 100_000) == bytes(100_001)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_body_longer_than_its_length_spoils_no_other(server: WebServer):
    server.pages["/long"] = web.claims(len(IMAGE), IMAGE + b"and more")
    urls = [server.url(path) for _ in range(30) for path in ("/long", "/image")]
    for result in fetch_all(urls, replace(CONFIG, concurrency=1)):
        if isinstance(result, SourceRow):
            assert result.image == IMAGE
        else:  # what was too much came together with the header
            assert (result.reason, result.url) == ("bad_response", server.url("/long"))


def test_what_is_stored(server: WebServer):
    server.pages["/typed"] = page(
        IMAGE,
        headers=[("Content-Type", "image/webp"), ("X-Robots-Tag", "nofollow"), ("X-Robots-Tag", "a: b")],
    )
    server.pages["/moved"] = redirect("/typed")
    stored = fetch(server.url("/moved#part"))
    assert stored == replace(
        row(server.url("/moved#part")),
        image=IMAGE,
        fetch={
            "status": 200,
            "final_url": server.url("/typed"),
            "content_type": "image/webp",
            "robots": "none",
            "x_robots_tag": "nofollow, a: b",
        },
    )
    refused = rejected(f"http://localhost:{server.port}/")
    assert (refused.reason, refused.retriable) == ("private_address", False)
    assert refused.fetch == {**FETCH, "status": None, "robots": None, "final_url": refused.url}
    assert (refused.chunk, refused.row, refused.key, refused.source) == (3, 0, "k0", "t#0")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", "bad_url"),
        ("no address", "scheme_refused"),
        ("file:///etc/hostname", "scheme_refused"),
        ("http://[::ffff:127.0.0.1]/", "private_address"),
        ("http://0x7f.1/", "private_address"),
        ("http://localhost/", "private_address"),
        ("http://" + "x" * 64 + ".org/", "unknown_host"),
        ("http://127.0.0.2:1/", "connection_failed"),
    ],
)
def test_addresses_that_lead_nowhere(url: str, expected: str):
    assert rejected(url, replace(CONFIG, respect_robots_txt=False)).reason == expected


def test_what_is_stored_is_of_the_last_attempt(server: WebServer):
    server.pages["/worse"] = in_turn(
        page(b"", 503, [("Content-Type", "text/html"), ("X-Robots-Tag", "nofollow")]), web.reset
    )
    refused = rejected(server.url("/worse"))
    assert refused.reason == "connection_failed"
    assert refused.fetch == {**FETCH, "status": None, "final_url": refused.url}


@pytest.mark.parametrize(
    ("answer", "setting"), [(web.drip, "download.total_timeout"), (web.stall, "download.read_timeout")]
)
def test_servers_that_take_their_time(server: WebServer, answer: Page, setting: str):
    server.pages["/slow"] = answer
    refused = rejected(server.url("/slow"), replace(IMPATIENT, respect_robots_txt=False))
    assert (refused.reason, refused.detail, refused.retriable) == ("timeout", setting, True)
    assert server.seen("/slow") == 2
    assert refused.fetch == {**FETCH, "final_url": refused.url, "robots": "off"}


def test_the_total_timeout_is_for_all_redirects_together(server: WebServer):
    for n in range(3):
        server.pages[f"/{n}"] = slowly(0.4, redirect(f"/{n + 1}"))
    server.pages["/3"] = page(IMAGE)
    config = replace(CONFIG, total_timeout=1.0, retries=0, respect_robots_txt=False)
    assert rejected(server.url("/0"), config).reason == "timeout"
    assert server.seen("/3") == 0


def test_no_tls(server: WebServer):
    url = server.url("/image").replace("http:", "https:")
    assert rejected(url, replace(CONFIG, respect_robots_txt=False)).reason == "tls_failed"


FORBIDS = b"User-agent: *\nDisallow: /private\n\nUser-agent: other\nDisallow: /"


@pytest.mark.parametrize(
    ("robots", "path", "expected", "stored"),
    [
        (page(FORBIDS), "/private/image", "robots_disallowed", "disallowed"),
        (page(FORBIDS), "/image", "", "allowed"),
        (page(b"User-agent: MaskClip\nDisallow: /"), "/image", "robots_disallowed", "disallowed"),
        (page(b"", 404), "/image", "", "none"),
        (page(b"", 403), "/image", "", "none"),
        (page(b"", 503), "/image", "robots_unreachable", "unreachable"),
        (page(b"", 429), "/image", "robots_unreachable", "unreachable"),
        (in_turn(page(b"", 503), page(FORBIDS)), "/image", "", "allowed"),
        (web.reset, "/image", "robots_unreachable", "unreachable"),
        (web.stall, "/image", "robots_unreachable", "unreachable"),
        (redirect("/moved.txt"), "/private/image", "robots_disallowed", "disallowed"),
        (redirect("http://localhost/robots.txt"), "/image", "robots_unreachable", "unreachable"),
        (redirect("file:///etc/robots.txt"), "/image", "robots_unreachable", "unreachable"),
        (web.endless, "/image", "", "allowed"),
        (page(FORBIDS + b"\n#" + bytes(600_000)), "/private/image", "robots_disallowed", "disallowed"),
        (
            page(gzip.compress(FORBIDS), headers=[("Content-Encoding", "gzip")]),
            "/private/image",
            "robots_disallowed",
            "disallowed",
        ),
    ],
)
def test_robots_txt(server: WebServer, robots: Page, path: str, expected: str, stored: str):
    server.pages |= {"/robots.txt": robots, "/moved.txt": page(FORBIDS), "/private/image": page(IMAGE)}
    result = fetch(server.url(path), IMPATIENT if robots is web.stall else CONFIG)
    assert (result.reason if isinstance(result, Reject) else "") == expected
    assert result.fetch is not None
    assert result.fetch["robots"] == stored
    assert server.seen(path) == (expected == "")
    if isinstance(result, Reject):
        assert result.retriable == (expected == "robots_unreachable")


def test_robots_txt_of_each_host_that_a_redirect_leads_to(server: WebServer):
    server.pages["127.0.0.3/robots.txt"] = page(b"User-agent: *\nDisallow: /")
    server.pages["/away"] = redirect(server.url("/image", "127.0.0.3"))
    refused = rejected(server.url("/away"))
    assert (refused.reason, server.seen("/image")) == ("robots_disallowed", 0)
    assert refused.fetch == {
        **FETCH,
        "status": 302,
        "final_url": server.url("/image", "127.0.0.3"),
        "robots": "disallowed",
    }


def test_robots_txt_is_fetched_once_per_host(server: WebServer):
    urls = [server.url(f"/image?{n}", host) for n in range(20) for host in web.HOSTS[1:]]
    server.pages["/robots.txt"] = slowly(0.1, page(FORBIDS))
    fetch_all(urls)
    assert [server.seen("/robots.txt", host) for host in web.HOSTS] == [0, 1, 1, 1]


def test_robots_txt_and_tags_can_be_left_aside(server: WebServer):
    server.pages["/robots.txt"] = page(b"User-agent: *\nDisallow: /")
    server.pages["/tagged"] = page(IMAGE, headers=[("X-Robots-Tag", "noai")])
    result = fetch(
        server.url("/tagged"), replace(CONFIG, respect_robots_txt=False, respect_x_robots_tag=False)
    )
    assert isinstance(result, SourceRow)
    assert result.fetch == {**FETCH, "final_url": result.url, "robots": "off", "x_robots_tag": "noai"}
    assert server.seen("/robots.txt") == 0


def test_every_reason_is_documented():
    text = Path(ROOT / "docs/download.md").read_text("utf-8")
    assert [word for word in REASONS if f"`{word}`" not in text] == []
    with pytest.raises(KeyError):
        reason("because")


def test_every_fate_is_a_known_reason():
    assert {reason(word).meaning for _, word, _ in FATES.values() if word} <= {
        r.meaning for r in REASONS.values()
    }
