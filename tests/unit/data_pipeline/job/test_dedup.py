"""Duplicates over a whole set, on a real local Ray, against comparing everything in plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from cluster.ray_tasks import ray_session
from data_pipeline.job.dedup import DROPPED_SCHEMA, DuplicateConfig, drop_duplicates, dropped_name
from data_pipeline.job.staged_rows import StagedRows
from tests.support.staged_set import StagedSet, expected_drops, planted

ALL = DuplicateConfig(bytes=True, pixels=True, pair=True, near_radius=3)
FOLDER = "staging/plan"


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(2):
        yield


def drops(
    rows: StagedSet, folder: Path, config: DuplicateConfig, chunks: int, partitions: int | None
) -> dict[str, tuple[str, str]]:
    """(reason, detail) by source, as the files say; the counts are checked against them."""
    names = rows.write(folder, chunks)
    candidates = sum(row.get("image_file") is not None for row in rows.rows)
    staged = StagedRows.of(str(folder), names)
    counts = drop_duplicates(staged, config, FOLDER, rows=candidates, partitions=partitions)
    found: dict[str, tuple[str, str]] = {}
    for chunk in range(chunks):
        path = folder / dropped_name(FOLDER, chunk)
        assert path.exists() == (chunk in counts)
        if path.exists():
            table = pq.read_table(path)
            assert table.schema == DROPPED_SCHEMA
            assert table["row"].to_pylist() == sorted(set(table["row"].to_pylist()))
            assert counts[chunk] == Counter(table["reason"].to_pylist())
            sources = pq.read_table(folder / names[chunk][0])["source"]
            lines = table.to_pylist()
            found |= {sources[x["row"]].as_py(): (x["reason"], x["detail"]) for x in lines}
    return found


CONFIGS = {
    "all": ALL,
    "bytes": DuplicateConfig(bytes=True),
    "pair": DuplicateConfig(pair=True),
    "equal hashes": DuplicateConfig(near_radius=0),
    "bytes and near": DuplicateConfig(bytes=True, near_radius=6),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_dropped_rows_are_those_of_comparing_everything(name: str, tmp_path: Path) -> None:
    rows = planted(900, seed=len(name))
    expected = expected_drops(rows.rows, CONFIGS[name])
    assert len({reason for reason, _ in expected.values()}) == len(CONFIGS[name].kinds) - (name == "all")
    assert drops(rows, tmp_path, CONFIGS[name], chunks=5, partitions=None) == expected


@pytest.mark.parametrize(("chunks", "partitions"), [(1, None), (13, None), (1, 1), (6, 2), (13, 7)])
def test_neither_the_cut_into_chunks_nor_the_exchange_changes_anything(
    chunks: int, partitions: int | None, tmp_path: Path
) -> None:
    rows = planted(600, seed=3)
    assert drops(rows, tmp_path, ALL, chunks, partitions) == expected_drops(rows.rows, ALL)


def test_without_pixels_a_pair_must_agree_in_pixels_and_caption(tmp_path: Path) -> None:
    rows = planted(600, seed=4)
    config = DuplicateConfig(bytes=True, pair=True)
    found = drops(rows, tmp_path, config, chunks=3, partitions=None)
    assert found == expected_drops(rows.rows, config)
    assert {reason for reason, _ in found.values()} == {"duplicate_bytes", "duplicate_pair"}


def test_what_stays_is_apart_and_what_went_has_a_smaller_neighbour(tmp_path: Path) -> None:
    radius = 4
    rows = planted(700, seed=5)
    found = drops(rows, tmp_path, DuplicateConfig(near_radius=radius), chunks=4, partitions=3)
    images = {row["source"]: row for row in rows.rows if row.get("image_file")}
    stays = [row["perceptual"] for source, row in images.items() if source not in found]
    assert all((a ^ b).bit_count() > radius for i, a in enumerate(stays) for b in stays[:i])
    assert found
    for source, (reason, kept) in found.items():
        assert reason == "near_duplicate"
        assert images[kept]["id"] < images[source]["id"]
        assert (images[kept]["perceptual"] ^ images[source]["perceptual"]).bit_count() <= radius


@pytest.mark.parametrize("partitions", [None, 3])
@pytest.mark.parametrize("config", [DuplicateConfig(), ALL])
def test_two_rows_with_one_id_are_an_error_that_names_both(
    config: DuplicateConfig, partitions: int | None, tmp_path: Path
) -> None:
    rows = planted(60, seed=1)
    images = [row for row in rows.rows if row.get("image_file")]
    images[20]["id"] = images[3]["id"]
    with pytest.raises(DataError, match="have one id") as error:
        drops(rows, tmp_path, config, chunks=3, partitions=partitions)
    assert images[3]["source"] in str(error.value)
    assert images[20]["source"] in str(error.value)


@pytest.mark.parametrize(
    ("column", "config"),
    [("sha256", ALL), ("pixels", DuplicateConfig(pair=True)), ("perceptual", ALL), ("id", DuplicateConfig())],
)
def test_marks_that_were_not_staged_are_an_error(
    column: str, config: DuplicateConfig, tmp_path: Path
) -> None:
    rows = planted(20, seed=1)
    next(row for row in rows.rows if row.get("image_file"))[column] = None
    with pytest.raises(DataError, match=f"without {column}"):
        drops(rows, tmp_path, config, chunks=2, partitions=None)


def test_a_set_without_images_has_no_duplicates(tmp_path: Path) -> None:
    refused: list[dict[str, Any]] = [row for row in planted(60, seed=2).rows if not row.get("image_file")]
    for partitions in (None, 2):
        assert drops(StagedSet(refused), tmp_path, ALL, chunks=2, partitions=partitions) == {}


def test_the_config_says_what_staging_must_compute() -> None:
    assert not DuplicateConfig().kinds
    assert DuplicateConfig(bytes=True).kinds
    assert not DuplicateConfig(bytes=True).needs_fingerprints
    for config in (DuplicateConfig(pixels=True), DuplicateConfig(pair=True), DuplicateConfig(near_radius=0)):
        assert config.needs_fingerprints
        assert config.kinds
    assert DuplicateConfig(bytes=True, pair=True, near_radius=2).kinds == ("bytes", "pair", "near")
    for radius in (-1, 17):
        with pytest.raises(ValueError, match="near_radius"):
            DuplicateConfig(near_radius=radius)
