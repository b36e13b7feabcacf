"""Order, bounds and manners of the download, and that nothing is left when it ends."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from data_pipeline.fetch.download import DownloadConfig, fetch_rows
from data_pipeline.records import Reject, SourceRow
from tests.support import web_server as web
from tests.support.web_rows import CONFIG, IMAGE, fetch, fetch_all, row
from tests.support.web_server import Exchange, Page, WebServer, in_turn, page, redirect, slowly


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer({"/image": page(IMAGE)}) as server:
        yield server


def closed_soon(server: WebServer) -> bool:
    return any(server.open_connections == 0 or time.sleep(0.02) for _ in range(250))


def test_results_come_in_the_order_of_the_rows(server: WebServer):
    for n in range(10):
        server.pages[f"/{n}"] = slowly(0.02 * (n * 7 % 10), page(b"%d" % n))
    rows: list[SourceRow | Reject] = [row(server.url(f"/{n * 3 % 10}"), n) for n in range(60)]
    rows[7] = row(server.url("/never"), 7, image=IMAGE)  # there already
    rows[20] = row(None, 20)
    rows[33] = Reject.of(row(None, 33), "no_caption", "none")
    rows[40] = row("http://localhost/", 40)
    results = list(fetch_rows(rows, CONFIG))
    assert [result.row for result in results] == list(range(60))
    assert [results[n] == rows[n] for n in (7, 20, 33)] == [True] * 3
    assert isinstance(results[40], Reject)
    for n in set(range(60)) - {7, 20, 33, 40}:
        result = results[n]
        assert isinstance(result, SourceRow)
        assert result.image == b"%d" % (n * 3 % 10)
    assert server.seen("/never") == 0


def test_two_runs_give_the_same(server: WebServer):
    server.pages |= {
        "/503": page(b"", 503),
        "/away": redirect("http://localhost/"),
        "/short": web.claims(9, b""),
    }
    urls = [server.url(path) for path in ("/image", "/503", "/away", "/short", "/404")] + [
        "http://127.0.0.2:1/"
    ]
    assert fetch_all(urls) == fetch_all(urls)


def until(true: Callable[[], bool], then: Page) -> Page:
    async def answer(exchange: Exchange) -> bool:
        while not true():
            await asyncio.sleep(0.01)
        return await then(exchange)

    return answer


@pytest.mark.parametrize(("hosts", "most", "most_per_host"), [(3, 5, 3), (1, 3, 3)])
def test_never_more_at_once_than_agreed(server: WebServer, hosts: int, most: int, most_per_host: int):
    server.pages["/image"] = until(lambda: server.most >= most, slowly(0.005, page(IMAGE)))
    urls = [server.url("/image", host) for _ in range(16) for host in web.HOSTS[1 : 1 + hosts]]
    results = fetch_all(urls, replace(CONFIG, concurrency=5, per_host=3))
    assert all(isinstance(result, SourceRow) for result in results)
    assert server.most == most
    assert max(server.most_per_host.values()) <= most_per_host


def test_a_slow_row_stops_no_other_and_the_window_is_bounded(server: WebServer):
    config = replace(CONFIG, concurrency=4, look_ahead=3)
    server.pages["/slow"] = until(lambda: server.seen("/image") >= 11, page(b"slow"))
    pulled = 0

    def rows() -> Iterator[SourceRow]:
        nonlocal pulled
        for n in range(100):
            pulled += 1
            yield row(server.url("/image" if n else "/slow", "127.0.0.2" if n else "127.0.0.3"), n)

    results = fetch_rows(rows(), config)
    first = next(results)  # comes only after the eleven others that fit in the window were asked for
    assert isinstance(first, SourceRow)
    assert (first.image, pulled) == (b"slow", 12)
    assert len(list(results)) == 99


def test_no_row_is_begun_while_the_buffer_is_full(server: WebServer):
    server.pages["/slow"] = slowly(0.5, page(b"slow"))
    pulled = 0

    def rows() -> Iterator[SourceRow]:
        nonlocal pulled
        yield row(server.url("/slow"), 0)
        for n in range(1, 400):
            pulled += 1
            yield row(server.url("/image"), n)
            time.sleep(0.01)  # so that the first image is there long before the last row

    results = fetch_rows(rows(), replace(CONFIG, look_ahead=100, buffer_bytes=1))
    next(results)
    assert pulled < 399
    results.close()  # type: ignore[attr-defined]


def test_a_full_buffer_stops_nothing_for_good(server: WebServer):
    urls = [server.url("/image")] * 50
    assert len(fetch_all(urls, replace(CONFIG, buffer_bytes=1))) == 50


def test_retry_after_is_waited_for(server: WebServer):
    server.pages["/wait"] = in_turn(page(b"", 429, [("Retry-After", "1")]), page(IMAGE))
    assert isinstance(fetch(server.url("/wait")), SourceRow)
    first, second = (t for t, r in zip(server.times, server.requests, strict=True) if r.path == "/wait")
    assert second - first >= 1


def test_a_host_that_asks_for_an_hour_is_asked_nothing_more(server: WebServer):
    server.pages["127.0.0.3/image"] = page(b"", 429, [("Retry-After", "3600")])
    hosts = ["127.0.0.3"] * 5 + ["127.0.0.2"]
    results = fetch_all([server.url("/image", host) for host in hosts], replace(CONFIG, concurrency=1))
    assert [r.reason if isinstance(r, Reject) else "" for r in results] == [
        "http_429",
        *["host_busy"] * 4,
        "",
    ]
    assert all(result.retriable for result in results if isinstance(result, Reject))
    assert server.seen("/image", "127.0.0.3") == 1


def test_crawl_delay_holds_for_the_host(server: WebServer):
    server.pages["/robots.txt"] = page(b"User-agent: *\nCrawl-delay: 0.2")
    begun = time.monotonic()
    fetch_all([server.url("/image")] * 4)
    assert time.monotonic() - begun >= 0.6


def test_we_say_who_we_are_and_carry_nothing(server: WebServer, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # whoever went through it would get nothing
    server.pages["/cookie"] = page(IMAGE, headers=[("Set-Cookie", "who=me")])
    config = replace(
        CONFIG, concurrency=1, contact="https://example.org/robot", allowed_networks=("127.0.0.0/8",)
    )
    results = fetch_all([server.url("/cookie", "localhost")] * 2, config)
    assert all(isinstance(result, SourceRow) for result in results)
    for request in server.requests:
        assert request.headers["user-agent"].startswith("maskclip/")
        assert request.headers["user-agent"].endswith(" (+https://example.org/robot)")
        assert request.headers["accept-encoding"] == "identity"
        assert not {"cookie", "authorization", "referer"} & set(request.headers)


def test_connections_are_used_again_while_rows_wait_for_the_host(server: WebServer):
    fetch_all([server.url("/image")] * 40, replace(CONFIG, concurrency=1))
    assert server.connections < 5
    assert closed_soon(server)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_leaves_nothing(server: WebServer, caplog: pytest.LogCaptureFixture, taken: int):
    server.pages["/slow"] = slowly(0.3, page(IMAGE))
    server.pages["127.0.0.4/robots.txt"] = slowly(0.3, page(b""))
    paths = [("/image", "127.0.0.2")] * 6 + [("/slow", "127.0.0.3"), ("/image", "127.0.0.4")] * 20
    threads = set(threading.enumerate())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        results = fetch_rows([row(server.url(*path), n) for n, path in enumerate(paths)], CONFIG)
        for _ in range(taken):
            assert isinstance(next(results), SourceRow)
        results.close()  # type: ignore[attr-defined]
        del results
        gc.collect()
    assert [str(warning.message) for warning in warned] == []
    assert caplog.messages == []  # asyncio logs tasks that nobody waited for
    assert closed_soon(server)
    left = [thread for thread in set(threading.enumerate()) - threads if thread.name == "maskclip-download"]
    assert left == []


def test_an_error_of_the_rows_is_the_callers(server: WebServer):
    def rows() -> Iterator[SourceRow]:
        yield row(server.url("/image"))
        raise OSError("the table is broken")

    with pytest.raises(OSError, match="the table is broken"):
        list(fetch_rows(rows(), CONFIG))
    assert closed_soon(server)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"concurrency": 0}, "download.concurrency"),
        ({"per_host_rate": 0.0}, "download.per_host_rate"),
        ({"retries": -1}, "download.retries"),
        ({"total_timeout": 0.0}, "download.total_timeout"),
        ({"schemes": ("http", "file")}, "download.schemes"),
        ({"schemes": ()}, "download.schemes"),
        ({"allowed_networks": ("10.0.0.1/8",)}, "download.allowed_networks"),
        ({"user_agent": "Mozilla/5.0 (X11)"}, "download.user_agent"),
        ({"contact": "me\r\nHost: b"}, "download.contact"),
        ({"x_robots_tags": ("no ai",)}, "download.x_robots_tags"),
    ],
)
def test_a_wrong_setting_names_its_key(settings: dict, key: str):
    with pytest.raises(ValueError, match=f"set {key}"):
        DownloadConfig(**settings)


def test_rows_that_wait_for_one_name_all_hear_that_it_is_refused():
    results = fetch_all(["http://localhost/"] * 20, replace(CONFIG, respect_robots_txt=False))
    assert [result.reason for result in results if isinstance(result, Reject)] == ["private_address"] * 20
