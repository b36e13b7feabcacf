"""An audit finds nothing in a whole set, and names whatever is not as it should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import ObjectNotFound
from data_pipeline.records import ShardFormat
from data_pipeline.upkeep import scan
from data_pipeline.upkeep.audit_job import audit
from data_pipeline.upkeep.merge import merge_datasets
from data_pipeline.upkeep.takedown import remove_samples
from tests.support.small_dataset import flip_byte
from tests.support.small_set import reseal, small_sample, write_set

ROWS = ("rows/rows-000000.parquet", "rows/rows-000001.parquet")
both_formats = pytest.mark.parametrize("format", get_args(ShardFormat))


def change_rows(folder: Path, name: str, change: Callable[[list[dict]], list[dict]]) -> None:
    """Rewrite a file of rows, and the manifest so that all files have their checksums."""
    table = pq.read_table(folder / name)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), folder / name)
    reseal(folder)


@both_formats
def test_a_whole_set(tmp_path: Path, format: ShardFormat) -> None:
    write_set(tmp_path, (3, 0, 2), ("small", "timeout", "small"), format=format)
    found = audit(str(tmp_path), workers=2)
    assert found.whole
    assert (found.rows_in, found.kept, found.dropped, found.pending) == (8, 5, 3, 0)
    assert found.reasons == {"small": 2, "timeout": 1}
    assert (found.retriable, found.chunks, found.shards, found.format) == (1, 2, 3, format)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert (found.files, found.bytes) == (len(files), sum(path.stat().st_size for path in files))
    assert found.orphans == ()


def test_many_buckets_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, (30, 20), ["small"] * 30)
    change_rows(tmp_path, ROWS[1], lambda rows: [*rows[:-1], {**rows[-1], "source": rows[-2]["source"]}])
    few = audit(str(tmp_path))
    monkeypatch.setattr(scan, "BUCKET_BYTES", 100)
    assert audit(str(tmp_path)) == few
    assert len(few.problems) == 1
    assert "row 38 of chunk 1 and row 39 of chunk 1 have one source" in few.problems[0]


def test_what_belongs_to_nothing_is_listed_and_no_problem(tmp_path: Path) -> None:
    write_set(tmp_path)
    for name in ("staging/chunk-000000.bin", "shard-000009.tar", ".tmp-123"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"left")
    remove_samples(str(tmp_path), "source", ["a.tar/001"], reason="", now=lambda: "now")
    found = audit(str(tmp_path))
    assert found.whole
    assert found.orphans == ("shard-000009.tar", "staging/chunk-000000.bin")
    assert found.removed == 1


@both_formats
def test_every_flipped_byte_is_found_and_an_image_is_named(tmp_path: Path, format: ShardFormat) -> None:
    write_set(tmp_path / "good", (3, 2), format=format)
    files = [p for p in (tmp_path / "good").rglob("*") if p.is_file() and p.name != "manifest.json"]
    rng = np.random.default_rng(1)
    for path in files:
        for offset in rng.integers(0, path.stat().st_size, 6):
            shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
            flip_byte(tmp_path / "bad" / path.relative_to(tmp_path / "good"), int(offset))
            found = audit(str(tmp_path / "bad"))
            assert not found.whole
            assert any(path.name in line for line in found.problems), (path, offset, found.problems)
    shard = tmp_path / "good" / ("shard-000001.tar" if format == "tar" else "shard-000001.arrow")
    flip_byte(shard, shard.read_bytes().index(small_sample(4).image) + 5)
    problems = audit(str(tmp_path / "good")).problems
    assert len(problems) == 2
    assert f"{shard.name}: sha256" in problems[0]
    assert "the image of sample '004' (index 1) is not what was written" in problems[1]


@both_formats
@pytest.mark.parametrize("cut", [0, 1, 100, 512, 1024, 1500])
def test_a_cut_shard_is_found_and_named_once_per_loss(tmp_path: Path, format: ShardFormat, cut: int) -> None:
    write_set(tmp_path, (3, 2), format=format)
    shard = tmp_path / ("shard-000000.tar" if format == "tar" else "shard-000000.arrow")
    shard.write_bytes(shard.read_bytes()[:cut])
    problems = audit(str(tmp_path)).problems
    assert all(line.startswith(shard.name) or f"/{shard.name}" in line for line in problems), problems
    assert f"{shard.name}: {cut} bytes" in problems[0]


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000001.arrow", *ROWS])
def test_a_missing_file_is_named_and_nothing_else(tmp_path: Path, name: str) -> None:
    write_set(tmp_path)
    (tmp_path / name).unlink()
    found = audit(str(tmp_path))
    assert not found.whole
    assert all(name in line for line in found.problems), found.problems


# In the first file of rows: samples 0, 2, 4 (shards 0, 0, 1), then a dropped row.
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[:-1], "rows_in: 7 in the rows, but the manifest says 8"),
        (lambda rows: [*rows, {**rows[3], "row": 4, "source": "a.tar/new"}], "rows_in: 9 in the rows"),
        (lambda rows: [{**rows[0], "index": 2}, *rows[1:]], "does not stand at shard 0 index 2"),
        (lambda rows: [{**rows[0], "shard": 1}, *rows[1:]], "does not stand at shard 1 index 0"),
        (lambda rows: [{**rows[0], "id": 5}, *rows[1:]], "id 5 is not that of its source 'a.tar/000'"),
        (lambda rows: [rows[0], {**rows[0], "row": 1}, *rows[2:]], "twice, say the rows: shard 0 index 0"),
        (lambda rows: [rows[0], {**rows[1], "source": rows[0]["source"]}, *rows[2:]], "have one source"),
        (lambda rows: [rows[0], {**rows[1], "fate": "lost"}, *rows[2:]], "neither kept nor dropped"),
        (lambda rows: [*rows[:3], {**rows[3], "reason": None}], "have no reason"),
        (lambda rows: [{**rows[0], "id": None}, *rows[1:]], "has no id, shard or index"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "not those of chunk 0 in their order"),
        (lambda rows: [{**row, "chunk": 1} for row in rows], "not those of chunk 0 in their order"),
        (
            lambda rows: [{**rows[0], "fate": "dropped", "reason": "small"}, *rows[1:]],
            "at shard 0 index 0 has no row that says so",
        ),
    ],
)
def test_books_that_do_not_add_up(
    tmp_path: Path, change: Callable[[list[dict]], list[dict]], says: str
) -> None:
    write_set(tmp_path)
    change_rows(tmp_path, ROWS[0], change)
    found = audit(str(tmp_path))
    assert not found.whole
    assert any(says in line for line in found.problems), found.problems


def test_a_sample_that_stands_twice_in_the_shards(tmp_path: Path) -> None:
    write_set(tmp_path, (3, 2), changes={4: {"id": small_sample(0).id}})
    lines = [line for line in audit(str(tmp_path)).problems if "stands in the shards" in line]
    assert lines == [
        f"id {small_sample(0).id} twice, stands in the shards: shard 0 index 0 and shard 1 index 1"
    ]


def test_counts_of_the_manifest_are_checked(tmp_path: Path) -> None:
    counts = {"rows_in": 8, "kept": 5, "dropped": 3, "dropped/small": 1, "dropped/other": 2}
    write_set(tmp_path, meta={"counts": counts})
    assert audit(str(tmp_path)).problems == (
        "dropped/other: 0 in the rows, but the manifest says 2",
        "dropped/small: 2 in the rows, but the manifest says 1",
        "dropped/undecodable: 1 in the rows, but the manifest says 0",
    )


def test_a_damaged_or_foreign_tombstone_is_a_problem(tmp_path: Path) -> None:
    write_set(tmp_path / "a")
    write_set(tmp_path / "b", origin="b.tar")
    done = remove_samples(str(tmp_path / "b"), "source", ["b.tar/001"], reason="", now=lambda: "now")
    assert done.tombstone is not None
    shutil.copytree(tmp_path / "b/tombstones", tmp_path / "a/tombstones")
    (problem,) = audit(str(tmp_path / "a")).problems
    assert f"id {small_sample(1, 'b.tar').id} is not in the data set" in problem
    flip_byte(tmp_path / "b" / done.tombstone, 10)
    (problem,) = audit(str(tmp_path / "b")).problems
    assert done.tombstone in problem


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="no job that was begun"):
        audit(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"recipe": {"transform": {"short_side": 225}}}, "the recipe is not the one of recipe_digest"),
        ({"recipe_digest": "0" * 64}, "the recipe is not the one of recipe_digest"),
        ({"inputs": {"chunks": 3}}, "inputs says 3 chunks, but there are files of rows of 2"),
        ({"inputs": None}, "inputs says None chunks"),
    ],
)
def test_a_manifest_that_contradicts_itself(tmp_path: Path, meta: dict, says: str) -> None:
    write_set(tmp_path, meta=meta)
    (problem,) = audit(str(tmp_path)).problems
    assert says in problem


def test_a_manifest_that_was_edited_by_hand(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    (problem,) = audit(str(tmp_path)).problems
    assert "it was edited" in problem


def test_the_manifest_of_a_merge_is_checked_down_to_its_parts(tmp_path: Path) -> None:
    write_set(tmp_path / "a")
    write_set(tmp_path / "b", origin="b.tar")
    merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    assert audit(str(tmp_path / "c")).whole
    path = tmp_path / "c/manifest.json"
    good = path.read_text()
    path.write_text(good.replace('"short_side":224', '"short_side":64', 1))
    (problem,) = audit(str(tmp_path / "c")).problems
    assert "merged_from, entry 1: the recipe is not" in problem
    inputs = json.loads(good)["meta"]["merged_from"][1]["inputs"]["digest"]
    path.write_text(good.replace(inputs, "0" * 64))
    (problem,) = audit(str(tmp_path / "c")).problems
    assert "not that of the inputs of merged_from" in problem
