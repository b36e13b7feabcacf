"""The exchange of rows by key, on a real local Ray, with workers that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import DataError
from cluster.ray_tasks import ray_session
from data_pipeline.job.exchange import Step, exchange

SCHEMA = pa.schema([("key", pa.int64()), ("value", pa.int64()), ("by", pa.int64())])


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(2):
        yield


def die_once(mark: Path) -> None:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def read(mark: Path | None, source: int) -> Iterator[pa.Table]:
    if mark is not None and source == 3:
        die_once(mark)
    value = np.arange(source * 100, source * 100 + 100)
    yield pa.table([value % 7, value, value % 5], schema=SCHEMA)


def sum_by(key: str, following: str, mark: Path | None, table: pa.Table) -> Iterator[pa.Table]:
    """One row per key with the sum of its values, so that a key in two tables would show."""
    if mark is not None and table.num_rows:
        die_once(mark)
    yield SCHEMA.empty_table()
    keys, values = table[key].to_numpy(), table["value"].to_numpy()
    for one in np.unique(keys):
        total = values[keys == one].sum()
        line = {"key": [one], "value": [total], "by": [total % 3]}
        yield pa.table(line, schema=SCHEMA)


def result(
    partitions: int | None, in_read: Path | None = None, in_step: Path | None = None, rows: int = 900
) -> set:
    tables = exchange(
        9,
        partial(read, in_read),
        [
            Step(key="key", fn=partial(sum_by, "key", "by", None)),
            Step(key="by", fn=partial(sum_by, "by", "key", in_step)),
        ],
        rows=rows,
        row_bytes=24,
        partitions=partitions,
    )
    return {(line["key"], line["value"]) for table in tables for line in table.to_pylist()}


def expected() -> set:
    values = np.arange(900)
    sums = [int(values[values % 7 == key].sum()) for key in range(7)]
    return {(by, sum(s for s in sums if s % 3 == by)) for by in {s % 3 for s in sums}}


@pytest.mark.parametrize("partitions", [None, 1, 5])
def test_all_rows_of_a_key_come_together(partitions: int | None) -> None:
    assert result(partitions) == expected()


@pytest.mark.parametrize("kill", [False, True])
def test_what_is_said_to_be_large_goes_through_files_and_comes_out_the_same(
    kill: bool, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    assert result(3, in_step=mark if kill else None, rows=10**9) == expected()
    assert mark.exists() == kill


@pytest.mark.parametrize("partitions", [None, 3])
@pytest.mark.parametrize("in_read", [True, False])
def test_a_worker_that_is_killed_changes_nothing(
    in_read: bool, partitions: int | None, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    found = result(partitions, mark, None) if in_read else result(partitions, None, mark)
    assert found == expected()
    assert mark.exists()


@pytest.mark.parametrize("partitions", [None, 3])
def test_an_error_of_a_step_is_raised_as_it_was(partitions: int | None) -> None:
    def refuse(table: pa.Table) -> Iterator[pa.Table]:
        raise DataError("the row is not good")
        yield table

    with pytest.raises(DataError, match=r"^the row is not good$"):
        exchange(
            4, partial(read, None), [Step(key="key", fn=refuse)], rows=9, row_bytes=9, partitions=partitions
        )


def test_the_context_of_the_caller_is_left_as_it_was() -> None:
    import ray.data

    before = ray.data.DataContext.get_current().copy()
    result(2)
    after = ray.data.DataContext.get_current()
    assert after.shuffle_input_batch_bytes == before.shuffle_input_batch_bytes
    assert after.enable_progress_bars == before.enable_progress_bars
