"""Rows with addresses, and limits under which the addresses of `web_server` play the web."""

from __future__ import annotations

from dataclasses import replace

from data_pipeline.fetch.download import DownloadConfig, fetch_rows
from data_pipeline.records import Reject, SourceRow

# 127.0.0.1 stays refused, as on any machine; the others stand for the public web.
CONFIG = DownloadConfig(
    concurrency=8,
    per_host_rate=None,
    retries=1,
    backoff_base=0.01,
    retry_after_cap=1.0,
    read_timeout=20.0,
    total_timeout=30.0,
    max_bytes=100_000,
    max_redirects=3,
    allowed_networks=("127.0.0.2/31", "127.0.0.4/32"),
)
IMPATIENT = replace(CONFIG, read_timeout=0.3, total_timeout=0.6)
IMAGE = b"\xff\xd8 an image"
FETCH = {"status": 200, "content_type": None, "robots": "none", "x_robots_tag": None}


def row(url: str | None, number: int = 0, image: bytes | None = None) -> SourceRow:
    return SourceRow(3, number, f"k{number}", f"t#{number}", "a caption", {}, image=image, url=url)


def fetch_all(urls: list[str], config: DownloadConfig = CONFIG) -> list[SourceRow | Reject]:
    return list(fetch_rows([row(url, n) for n, url in enumerate(urls)], config))


def fetch(url: str, config: DownloadConfig = CONFIG) -> SourceRow | Reject:
    return fetch_all([url], config)[0]


def rejected(url: str, config: DownloadConfig = CONFIG) -> Reject:
    result = fetch(url, config)
    assert isinstance(result, Reject), result
    return result
