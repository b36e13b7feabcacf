"""The plan of the shards and the final rows, on a real local Ray, against plain Python."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import DataError
from cluster.ray_tasks import ray_session
from cluster.store import StoreConfig, open_store
from cluster.store_local import LocalStore
from data_pipeline.job import staged_rows
from data_pipeline.job.dedup import DuplicateConfig
from data_pipeline.job.selection import PLAN_SCHEMA, Selection, ShardConfig, read_plan, rows_name, select_rows
from data_pipeline.job.selection_writer import shard_of
from data_pipeline.keyed import mix
from data_pipeline.records import ROWS_SCHEMA, STAGED_SCHEMA
from tests.support.paths import ROOT
from tests.support.staged_set import StagedSet, expected_drops, planted, refused_row, staged_row, write_round

ALL = DuplicateConfig(bytes=True, pixels=True, pair=True, near_radius=3)
NONE = DuplicateConfig()
GLOBAL = ShardConfig(shuffle="global", samples_per_shard=40, seed=7)
IN_ORDER = ShardConfig(samples_per_shard=40)


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(2):
        yield


def final_rows(folder: Path, selection: Selection) -> list[dict[str, Any]]:
    """All final rows, chunk by chunk; the files are what the selection says."""
    lines = []
    for chunk, entry in enumerate(selection.rows):
        data = (folder / entry.name).read_bytes()
        assert entry.name == rows_name(chunk)
        assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        table = pq.read_table(folder / entry.name)
        assert table.schema.equals(ROWS_SCHEMA, check_metadata=True)
        assert table["row"].to_pylist() == sorted(set(table["row"].to_pylist()))
        assert set(table["chunk"].to_pylist()) <= {chunk}
        lines += table.to_pylist()
    return lines


def plan(folder: Path, selection: Selection) -> list[list[dict[str, Any]]]:
    """The plan of each shard; its files are what the selection says."""
    per_part = selection.shards_per_part
    for number, entry in enumerate(selection.parts):
        data = (folder / entry.name).read_bytes()
        assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        groups = pq.ParquetFile(folder / entry.name).metadata.num_row_groups
        assert groups == min(per_part, selection.num_shards - number * per_part)
    store = open_store(str(folder))
    tables = [read_plan(store, shard, per_part) for shard in range(selection.num_shards)]
    assert all(table.schema.equals(PLAN_SCHEMA) for table in tables)
    return [table.to_pylist() for table in tables]


def check(folder: Path, rows: StagedSet, selection: Selection, duplicates: DuplicateConfig) -> None:
    """The books, and that plan and rows say the same of every row."""
    lines = final_rows(folder, selection)
    assert [line["source"] for line in lines] == [row["source"] for row in rows.rows]
    assert selection.rows_in == len(lines)
    drops = expected_drops(rows.rows, duplicates)
    places = {}
    for shard, planned in enumerate(plan(folder, selection)):
        assert len(planned) == selection.shard_sizes[shard]
        assert [(row["shard"], row["index"]) for row in planned] == [(shard, i) for i in range(len(planned))]
        for row in planned:
            assert row["source"] not in places
            places[row["source"]] = (row["shard"], row["index"], row)
    for line, row in zip(lines, rows.rows, strict=True):
        for name in ("key", "url", "retriable", "id", "sha256", "fetch"):
            assert line[name] == row.get(name)
        if line["fate"] == "kept":
            shard, index, planned = places.pop(row["source"])
            assert (line["shard"], line["index"]) == (shard, index)
            assert (line["reason"], line["detail"]) == (None, None)
            assert {n: planned[n] for n in STAGED_SCHEMA.names if n not in ("chunk", "row")} == {
                n: row.get(n) for n in STAGED_SCHEMA.names if n not in ("chunk", "row")
            }
            assert (planned["chunk"], planned["row"]) == (line["chunk"], line["row"])
        else:
            assert line["fate"] == "dropped"
            assert (line["shard"], line["index"]) == (None, None)
            expected = (row["reason"], row["detail"]) if row.get("reason") else drops[row["source"]]
            assert (line["reason"], line["detail"]) == expected
    assert not places
    reasons = Counter(line["reason"] for line in lines if line["fate"] == "dropped")
    assert selection.dropped == dict(sorted(reasons.items()))
    assert selection.rows_in == selection.samples + sum(selection.dropped.values())
    assert selection.samples == sum(selection.shard_sizes)


@pytest.mark.parametrize("duplicates", [NONE, ALL], ids=["no duplicates", "all duplicates"])
@pytest.mark.parametrize("shards", [IN_ORDER, GLOBAL], ids=["in order", "global"])
def test_every_row_is_in_the_books_once_and_where_it_must_be(
    shards: ShardConfig, duplicates: DuplicateConfig, tmp_path: Path
) -> None:
    rows = planted(700, seed=1)
    selection = select_rows(str(tmp_path), rows.write(tmp_path, 6), duplicates, shards)
    check(tmp_path, rows, selection, duplicates)


def test_in_order_means_a_shard_per_chunk_that_keeps_rows_in_the_order_of_the_source(tmp_path: Path) -> None:
    rows = planted(300, seed=2)
    for row in rows.rows[100:200]:  # the middle chunk keeps nothing
        row.update(image_file=None, reason="undecodable", detail="broken")
    names = []
    for chunk in range(3):
        name = f"staging/rows-{chunk:06d}.parquet"
        part = rows.rows[chunk * 100 : chunk * 100 + 100]
        write_round(tmp_path / name, [{**row, "chunk": chunk, "row": i} for i, row in enumerate(part)])
        names.append([name])
    selection = select_rows(str(tmp_path), names, NONE, IN_ORDER)
    check(tmp_path, rows, selection, NONE)
    assert selection.num_shards == 2
    for shard, chunk in enumerate((0, 2)):
        planned = plan(tmp_path, selection)[shard]
        assert {row["chunk"] for row in planned} == {chunk}
        assert [row["row"] for row in planned] == sorted(row["row"] for row in planned)


def test_global_means_a_shard_by_hash_and_the_rank_by_the_same_hash(tmp_path: Path) -> None:
    rows = planted(500, seed=3)
    selection = select_rows(str(tmp_path), rows.write(tmp_path, 4), NONE, GLOBAL)
    ids = [row["id"] for row in rows.rows if row.get("image_file")]
    assert selection.num_shards == -(-len(ids) // GLOBAL.samples_per_shard)
    expected: list[list[int]] = [[] for _ in range(selection.num_shards)]
    for one in sorted(ids, key=lambda one: int(mix(GLOBAL.seed, one))):
        expected[int(mix(GLOBAL.seed, one)) * selection.num_shards >> 64].append(one)
    assert [[row["id"] for row in shard] for shard in plan(tmp_path, selection)] == expected
    other = select_rows(
        str(tmp_path), rows.write(tmp_path, 4), NONE, replace(GLOBAL, seed=8), folder="staging/other"
    )
    assert other.parts[0].sha256 != selection.parts[0].sha256


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**31 - 1))
def test_the_shard_of_a_hash_is_exact(value: int, num_shards: int) -> None:
    assert shard_of(np.array([value], np.uint64), num_shards).tolist() == [value * num_shards >> 64]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all that a selection wrote."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name != "staging")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.mark.parametrize("shards", [IN_ORDER, GLOBAL], ids=["in order", "global"])
def test_all_bytes_are_the_same_however_it_is_exchanged(shards: ShardConfig, tmp_path: Path) -> None:
    rows = planted(400, seed=4)
    made = []
    for partitions in (None, 1, 4):
        folder = tmp_path / str(partitions)
        select_rows(str(folder), rows.write(folder, 5), ALL, shards, partitions=partitions)
        made.append(digests(folder))
    assert len(made[0]) > 6
    assert made[0] == made[1] == made[2]


SCRIPT = """
import sys
from pathlib import Path
from cluster.ray_tasks import ray_session
from data_pipeline.job.selection import select_rows
from tests.support.staged_set import planted
from tests.unit.data_pipeline.job.test_selection import ALL, GLOBAL
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with ray_session(4):
        select_rows(str(folder), planted(400, seed=4).write(folder, 5), ALL, GLOBAL, partitions=2)
"""


def test_all_bytes_are_the_same_on_more_cores(tmp_path: Path) -> None:
    folder = tmp_path / "more"
    subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, check=True, timeout=200)
    here = tmp_path / "here"
    select_rows(str(here), planted(400, seed=4).write(here, 5), ALL, GLOBAL)
    assert digests(folder) == digests(here)


def test_the_cut_into_chunks_does_not_change_who_stays_and_where(tmp_path: Path) -> None:
    rows = planted(400, seed=5)
    fates = []
    for chunks in (1, 3, 17):
        folder = tmp_path / str(chunks)
        selection = select_rows(str(folder), rows.write(folder, chunks), ALL, GLOBAL)
        lines = final_rows(folder, selection)
        fates.append([(x["source"], x["reason"], x["detail"], x["shard"], x["index"]) for x in lines])
    assert fates[0] == fates[1] == fates[2]


def test_of_a_row_that_is_in_several_rounds_the_last_counts(tmp_path: Path) -> None:
    draw = random.Random(6)
    first = [staged_row(f"t/{i}", draw) if i % 3 else refused_row(f"t/{i}", "timeout") for i in range(30)]
    second = [
        staged_row(f"t/{i}", draw) if i % 2 else refused_row(f"t/{i}", "not_found") for i in (27, 3, 6, 0)
    ]
    third = [staged_row("t/6", draw, caption="at last")]
    names = []
    for number, rows in enumerate((first, second, third)):
        name = f"staging/rows-000000-r{number}.parquet"
        numbered = [{**row, "chunk": 0, "row": int(row["source"][2:])} for row in rows]
        write_round(tmp_path / name, numbered)
        names.append(name)
    merged = {row["source"]: row for rows in (first, second, third) for row in rows}
    expected = StagedSet([merged[f"t/{i}"] for i in range(30)])
    selection = select_rows(str(tmp_path), [names], ALL, GLOBAL)
    check(tmp_path, expected, selection, ALL)
    assert selection.dropped == {"not_found": 1, "timeout": 6}


def test_tiny_shards_may_be_empty_and_are_planned_all_the_same(tmp_path: Path) -> None:
    rows = planted(40, seed=8)
    shards = replace(GLOBAL, samples_per_shard=1)
    selection = select_rows(str(tmp_path), rows.write(tmp_path, 2), NONE, shards)
    check(tmp_path, rows, selection, NONE)
    assert 0 in selection.shard_sizes


@pytest.mark.parametrize("shards", [IN_ORDER, GLOBAL], ids=["in order", "global"])
@pytest.mark.parametrize("count", [0, 5])
def test_a_set_that_keeps_nothing_has_rows_and_no_shards(
    count: int, shards: ShardConfig, tmp_path: Path
) -> None:
    rows = StagedSet([refused_row(f"t/{i}", "timeout") for i in range(count)])
    name = "staging/rows-000000.parquet"
    write_round(tmp_path / name, [{**row, "chunk": 0, "row": i} for i, row in enumerate(rows.rows)])
    selection = select_rows(str(tmp_path), [[name]], ALL, shards)
    check(tmp_path, rows, selection, ALL)
    assert (selection.num_shards, selection.parts, selection.shard_sizes) == (0, (), ())


def test_no_chunks_are_no_rows(tmp_path: Path) -> None:
    selection = select_rows(str(tmp_path), [], ALL, GLOBAL)
    assert (selection.rows_in, selection.samples, selection.num_shards, selection.rows) == (0, 0, 0, ())


def test_a_second_call_answers_from_its_record_unless_something_is_missing(tmp_path: Path) -> None:
    rows = planted(200, seed=9)
    names = rows.write(tmp_path, 3)
    selection = select_rows(str(tmp_path), names, ALL, GLOBAL)
    before = digests(tmp_path)
    (tmp_path / "staging/plan/dropped-000000.parquet").unlink()  # it would be there again, had it been made
    assert select_rows(str(tmp_path), names, ALL, GLOBAL) == selection
    assert not (tmp_path / "staging/plan/dropped-000000.parquet").exists()
    (tmp_path / selection.parts[0].name).unlink()
    (tmp_path / selection.rows[1].name).write_bytes(b"cut short")
    assert select_rows(str(tmp_path), names, ALL, GLOBAL) == selection
    assert digests(tmp_path) == before
    assert select_rows(str(tmp_path), names, NONE, GLOBAL) != selection
    assert Selection.from_bytes(selection.to_bytes()) == selection


def test_a_large_plan_is_read_by_ranges_of_one_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = planted(2000, seed=10)  # 43 shards, all in one part
    selection = select_rows(str(tmp_path), rows.write(tmp_path, 2), NONE, GLOBAL)
    whole = [read_plan(open_store(str(tmp_path)), shard, selection.shards_per_part) for shard in (0, 5)]
    asked = []

    class Counting(LocalStore):
        def get_range(self, key: str, start: int, length: int) -> bytes:
            asked.append(length)
            return super().get_range(key, start, length)

        def get(self, key: str) -> bytes:
            raise AssertionError(f"{key} was read whole")

    monkeypatch.setattr(staged_rows, "_WHOLE_BYTES", 0)
    ranged = [
        read_plan(Counting(str(tmp_path), StoreConfig()), shard, selection.shards_per_part)
        for shard in (0, 5)
    ]
    assert ranged == whole
    assert sum(asked) < selection.parts[0].size


def broken_chunk(folder: Path, change: dict[str, Any]) -> list[list[str]]:
    row = {**staged_row("t/0", random.Random(0)), "chunk": 0, "row": 0, **change}
    write_round(folder / "staging/rows-000000.parquet", [row])
    return [["staging/rows-000000.parquet"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_file": None}, "neither"),
        ({"reason": "undecodable"}, "both"),
        ({"chunk": 3}, "another chunk"),
    ],
)
def test_staged_rows_that_contradict_themselves_are_an_error(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        select_rows(str(tmp_path), broken_chunk(tmp_path, change), NONE, IN_ORDER)


def test_a_broken_or_repeated_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    names = broken_chunk(tmp_path, {})
    path = tmp_path / names[0][0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"rows-000000\.parquet: not a file of staged rows"):
        select_rows(str(tmp_path), names, NONE, IN_ORDER)
    row = {**staged_row("t/0", random.Random(0)), "chunk": 0, "row": 0}
    write_round(path, [row, row])
    with pytest.raises(DataError, match=r"rows-000000\.parquet: has a row twice"):
        select_rows(str(tmp_path), names, NONE, IN_ORDER)


def test_the_config_names_the_key_to_change() -> None:
    with pytest.raises(ValueError, match="samples_per_shard"):
        ShardConfig(samples_per_shard=0)
    assert ShardConfig().shards_per_part == 16
    assert ShardConfig(samples_per_shard=10**6).shards_per_part == 1
