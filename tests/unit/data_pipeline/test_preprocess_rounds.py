"""Rows whose download fails for what may pass are tried again, and only these."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.errors import StorageUnavailable
from cluster.ray_tasks import ray_session
from cluster.store import open_store
from data_pipeline.catalog import verify_dataset
from data_pipeline.fetch.download import DownloadConfig
from data_pipeline.image.transforms import TransformConfig
from data_pipeline.ingest.sources import SourceConfig
from data_pipeline.ingest.table_source import TableConfig
from data_pipeline.job.preprocess import PreprocessConfig, run_preprocess
from tests.support.raw_input import encode, noise
from tests.support.web_server import WebServer, in_turn, page


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(2):
        yield


LOCAL = DownloadConfig(allow_private_addresses=True, respect_robots_txt=False, retries=0, per_host_rate=None)


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[WebServer, PreprocessConfig]]:
    """A table of 10 images, two on a server that is busy for the first two requests, one that is gone."""
    with WebServer() as server:
        for number in range(9):
            image = page(encode(noise(60, 50, number)))
            away = page(b"", 503)
            server.pages[f"/{number}.jpg"] = in_turn(away, away, image) if number in (2, 5) else image
        (tmp_path / "raw").mkdir()
        with (tmp_path / "raw" / "rows.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("URL", "TEXT"))
            writer.writerows((server.url(f"/{number}.jpg"), f"caption {number}") for number in range(10))
        table = TableConfig(url_column="URL", caption_columns=("TEXT",))
        source = SourceConfig(uri=str(tmp_path / "raw"), kind="table", table=table, rows_per_chunk=5)
        yield (
            server,
            PreprocessConfig(
                source=source,
                output=str(tmp_path / "set"),
                download=LOCAL,
                transform=TransformConfig(short_side=48),
                retry_rounds=0,
            ),
        )


def test_a_rerun_tries_only_what_may_pass(busy: tuple[WebServer, PreprocessConfig]) -> None:
    server, recipe = busy
    with pytest.raises(StorageUnavailable, match=r"2 of 10 rows .*http_503 2.*same command"):
        run_preprocess(recipe)
    assert not open_store(recipe.output).exists("manifest.json")
    with pytest.raises(StorageUnavailable, match="2 of 10 rows"):
        run_preprocess(recipe)
    summary = run_preprocess(recipe)
    assert (summary.samples, summary.rejects) == (9, {"http_404": 1})
    asked = [server.seen(f"/{number}.jpg") for number in range(10)]
    assert asked == [3 if number in (2, 5) else 1 for number in range(10)]
    assert verify_dataset(recipe.output) == []


def test_rounds_of_one_run_try_again(busy: tuple[WebServer, PreprocessConfig]) -> None:
    server, recipe = busy
    states: list[dict[str, Any]] = []
    summary = run_preprocess(replace(recipe, retry_rounds=5), states.append)
    assert (summary.samples, summary.rejects) == (9, {"http_404": 1})
    assert [server.seen(f"/{number}.jpg") for number in (1, 2, 5, 9)] == [1, 3, 3, 1]
    assert [s["done"] for s in states if s["stage"] == "retry"] == [0, 1, 2, 0, 1, 2]


def test_few_missing_rows_are_dropped_as_retriable(busy: tuple[WebServer, PreprocessConfig]) -> None:
    _, recipe = busy
    summary = run_preprocess(replace(recipe, accept_retriable=0.2))
    assert (summary.samples, summary.rejects) == (7, {"http_404": 1, "http_503": 2})
    assert summary.retriable == 2
    files = sorted(Path(recipe.output).glob("rows/*"))
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert [row["retriable"] for row in rows] == [number in (2, 5) for number in range(10)]
