"""Stage 3a of the pipeline: which rows are duplicates of another row, over the whole set.

Of rows that are equal the one with the smallest id stays. The steps, in this order; a row that is dropped in
one takes no part in the next:

    ids     two rows with one id are an error of the input
    bytes   equal original files (sha256)
    pixels  equal stored pixels
    pair    equal stored pixels and equal caption
    near    a perceptual hash within the radius of that of a row with a smaller id (not from the paper)

Only numbers travel between machines, 25 to 75 bytes a row. `docs/duplicates.md` has the costs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import comb

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.scratch import scratch_folder
from cluster.store import open_store
from data_pipeline.job.exchange import Step, exchange
from data_pipeline.job.near import MAX_RADIUS, band_keys, best_extra_bands, smallest_near
from data_pipeline.job.staged_rows import StagedRows, runs

REASONS = ("", "duplicate_bytes", "duplicate_pixels", "duplicate_pair", "near_duplicate")
DROPPED_SCHEMA = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])

_EXACT = ("bytes", "pixels", "pair")
_ROW_BITS = np.uint64(32)
_ALL_BITS = np.arange(64)
_LOST, _LEFT = pc.field("reason") > 0, pc.field("reason") == 0
# What is known of a row: its place, the step that dropped it (0: none), and the row for which it was.
_BASE = [("id", pa.int64()), ("at", pa.uint64())]
_FATE = [("reason", pa.uint8()), ("kept_id", pa.int64()), ("kept_at", pa.uint64())]
_LOST_SCHEMA = pa.schema([*_BASE, *_FATE, ("kept_chunk", pa.int64())])
_PLACE = [("chunk", pa.int64()), ("row", pa.int64())]
_NAMED_SCHEMA = pa.schema([*_PLACE, ("reason", pa.uint8()), ("kept_id", pa.int64()), ("detail", pa.string())])
_COUNT_SCHEMA = pa.schema([("chunk", pa.int64()), ("reason", pa.uint8()), ("rows", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class DuplicateConfig:
    """Which duplicates are dropped. All of it is off by default."""

    bytes: bool = False
    """Drop rows whose original image file is equal to another's, byte by byte."""
    pixels: bool = False
    """Drop rows whose stored image has the same size and pixels as another's."""
    pair: bool = False
    """Drop rows with the pixels and the caption of another; the same image with another caption stays."""
    near_radius: int | None = None
    """Drop rows whose 64-bit perceptual hash differs in at most so many bits from that of a row with a
    smaller id; 0 to 16, null: off. The cost grows fast beyond 4."""

    def __post_init__(self) -> None:
        if self.near_radius is not None and not 0 <= self.near_radius <= MAX_RADIUS:
            raise ValueError(
                f"near_radius is {self.near_radius}: set near_radius to 0 to {MAX_RADIUS}, or to null"
            )

    @property
    def needs_fingerprints(self) -> bool:
        """Whether staging must compute the hashes of the stored pixels."""
        return self.pixels or self.pair or self.near_radius is not None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The steps after the ids, in order."""
        exact = tuple(kind for kind in _EXACT if getattr(self, kind))
        return exact if self.near_radius is None else (*exact, "near")


def drop_duplicates(
    staged: StagedRows, config: DuplicateConfig, folder: str, *, rows: int, partitions: int | None = None
) -> dict[int, Counter[str]]:
    """Find the duplicates among all staged rows that have an image, and write them to the store.

    `folder`/dropped-000000.parquet holds the rows that are dropped from chunk 0 (DROPPED_SCHEMA, by row;
    detail is the source of the row for which it went); a chunk that loses none has no such file. `rows` is
    the number of candidates. Returns the number of dropped rows by chunk and reason. Needs a ray_session.

    Raises DataError when two rows have one id, when fingerprints that are needed are not there, and when a
    search for near duplicates would not end (see near.py).
    """
    kinds = config.kinds
    steps = [Step(key="id", fn=partial(_check_ids, staged, kinds[0] if kinds else None))]
    extra = 0
    if config.near_radius:
        extra = best_extra_bands(rows, 64, config.near_radius)
    for kind, following in zip(kinds, (*kinds[1:], None), strict=False):
        if kind == "near" and config.near_radius:
            fn = partial(_collapse_and_spread, config.near_radius, extra)
            steps.append(Step(key="bucket", fn=fn))
            copies = float(comb(config.near_radius + extra, extra))
            steps.append(Step(key="bucket", fn=partial(_drop_near, config.near_radius), copies=copies))
        else:
            steps.append(Step(key="bucket", fn=partial(_drop_equal, kind, following)))
    if kinds:
        steps.append(Step(key="kept_chunk", fn=partial(_name_kept, staged)))
        steps.append(Step(key="chunk", fn=partial(_write_dropped, staged.uri, folder)))
    width = 16 + 25 * bool(kinds) + 16 * len(kinds)
    counts = exchange(
        staged.num_chunks,
        partial(_read_marks, staged, kinds),
        steps,
        rows=rows,
        row_bytes=width,
        partitions=partitions,
    )
    dropped: dict[int, Counter[str]] = {}
    for table in counts:
        for line in table.to_pylist():
            dropped.setdefault(line["chunk"], Counter())[REASONS[line["reason"]]] += line["rows"]
    return dropped


def dropped_name(folder: str, chunk: int) -> str:
    """Key of the duplicates of a chunk."""
    return f"{folder}/dropped-{chunk:06d}.parquet"


def _read_marks(staged: StagedRows, kinds: tuple[str, ...], chunk: int) -> Iterator[pa.Table]:
    """The marks of the rows of a chunk that have an image."""
    needed = {
        "bytes": ["sha256"],
        "pixels": ["pixels"],
        "pair": ["pixels", "caption"],
        "near": ["perceptual"],
    }
    columns = [column for kind in kinds for column in needed[kind]]
    table = staged.read(chunk, ["row", "id", "image_file", *columns])
    table = table.filter(table["image_file"].is_valid()).combine_chunks()
    for column in ("id", *columns):
        if table[column].null_count:
            raise DataError(
                f"{staged.uri}: chunk {chunk} has {table[column].null_count} staged images without {column}; "
                "stage again with this recipe"
            )
    rows = table["row"].to_numpy()
    if rows.size and not 0 <= rows.min() <= rows.max() < 2**32:
        raise DataError(
            f"{staged.uri}: chunk {chunk} has more than 2^32 rows; cut the input into more chunks"
        )
    n = table.num_rows
    marks = {"id": table["id"].to_numpy(), "at": (np.uint64(chunk) << _ROW_BITS) | rows.astype(np.uint64)}
    if kinds:
        marks |= {"reason": np.zeros(n, np.uint8), "kept_id": np.zeros(n, np.int64)}
        marks |= {"kept_at": np.zeros(n, np.uint64)}
    for kind in kinds:
        if kind == "near":
            marks["near"] = table["perceptual"].to_numpy()
            continue
        digests = b"".join(_digests(kind, table))
        words = np.frombuffer(digests, ">u8").reshape(n, 2).astype(np.uint64)
        marks |= {f"{kind}_hi": words[:, 0].copy(), f"{kind}_lo": words[:, 1].copy()}
    yield pa.table(marks)


def _digests(kind: str, table: pa.Table) -> Iterator[bytes]:
    """16 bytes for each row that are equal for duplicates of this kind."""
    if kind == "bytes":
        yield from (value[:16] for value in table["sha256"].to_pylist())
    elif kind == "pixels":
        yield from table["pixels"].to_pylist()
    else:
        pairs = zip(table["pixels"].to_pylist(), table["caption"].to_pylist(), strict=True)
        yield from (hashlib.blake2b(p + c.encode(), digest_size=16).digest() for p, c in pairs)


def _check_ids(staged: StagedRows, following: str | None, table: pa.Table) -> Iterator[pa.Table]:
    ids, at = table["id"].to_numpy(), table["at"].to_numpy()
    order = np.lexsort((at, ids))
    again = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if again.size:
        first, second = (_source(staged, at[order[again[0] + i]]) for i in (0, 1))
        raise DataError(
            f"{staged.uri}: the input rows {first} and {second} have one id, {ids[order[again[0]]]}; "
            "rename or remove one of them"
        )
    if following is None:
        yield table.slice(0, 0)
    else:
        yield _with_bucket(table, following)


def _with_bucket(table: pa.Table, kind: str | None) -> pa.Table:
    """The table with the key of the next step; after the last one, its dropped rows alone."""
    if kind is None:
        lost = table.filter(_LOST)
        chunk = (lost["kept_at"].to_numpy() >> _ROW_BITS).astype(np.int64)
        return lost.select(_LOST_SCHEMA.names[:-1]).append_column("kept_chunk", pa.array(chunk))
    bucket = table["near" if kind == "near" else f"{kind}_hi"]
    if "bucket" in table.column_names:
        return table.set_column(table.column_names.index("bucket"), "bucket", bucket)
    return table.append_column("bucket", bucket)


def _mark_equal(table: pa.Table, keys: list[str]) -> pa.Table:
    """Drop, of the rows that are left and agree on `keys`, all but the one with the smallest id."""
    reason, kept_id, kept_at = (table[name].to_numpy().copy() for name, _ in _FATE)
    ids, at = table["id"].to_numpy(), table["at"].to_numpy()
    left = np.flatnonzero(reason == 0)
    values = [table[key].to_numpy()[left] for key in keys]
    order = np.lexsort((ids[left], *values))
    first = np.zeros(left.size, bool)
    first[:1] = True
    for value in values:
        first[1:] |= np.diff(value[order]) != 0
    leader = np.maximum.accumulate(np.where(first, np.arange(left.size), 0))
    lost, leaders = left[order[~first]], left[order[leader[~first]]]
    reason[lost] = REASONS.index("near_duplicate" if keys == ["near"] else f"duplicate_{keys[0][:-3]}")
    kept_id[lost], kept_at[lost] = ids[leaders], at[leaders]
    for (name, _), column in zip(_FATE, (reason, kept_id, kept_at), strict=True):
        table = table.set_column(table.column_names.index(name), name, pa.array(column))
    return table.drop_columns(keys)


def _drop_equal(kind: str, following: str | None, table: pa.Table) -> Iterator[pa.Table]:
    keys = ["near"] if kind == "near" else [f"{kind}_hi", f"{kind}_lo"]
    yield _with_bucket(_mark_equal(table, keys), following)


def _collapse_and_spread(radius: int, extra: int, table: pa.Table) -> Iterator[pa.Table]:
    """Drop equal hashes, so that a crowd of blank images is one row; then a copy of each row for each key."""
    hashes = table["near"]
    table = _mark_equal(table, ["near"]).append_column("near", hashes)
    lost = table.filter(_LOST)
    yield lost.set_column(lost.column_names.index("bucket"), "bucket", lost["at"])
    left = table.filter(_LEFT)
    for key in band_keys(left["near"].to_numpy(), _ALL_BITS, radius, extra):
        yield left.set_column(left.column_names.index("bucket"), "bucket", pa.array(key))


def _drop_near(radius: int, table: pa.Table) -> Iterator[pa.Table]:
    yield _with_bucket(table.filter(_LOST), None)
    table = table.filter(_LEFT).combine_chunks()
    ids = table["id"].to_numpy()
    found = smallest_near(table["near"].to_numpy(), ids, table["bucket"].to_numpy(), radius)
    lost = np.flatnonzero(found >= 0)
    at = table["at"].to_numpy()
    columns = {
        "id": ids[lost],
        "at": at[lost],
        "reason": np.full(lost.size, REASONS.index("near_duplicate"), np.uint8),
        "kept_id": ids[found[lost]],
        "kept_at": at[found[lost]],
        "kept_chunk": (at[found[lost]] >> _ROW_BITS).astype(np.int64),
    }
    yield pa.table(columns, schema=_LOST_SCHEMA)


def _name_kept(staged: StagedRows, table: pa.Table) -> Iterator[pa.Table]:
    """Put the source of the kept row into the table; each chunk that kept one is read once."""
    table = table.sort_by([("kept_at", "ascending"), ("at", "ascending")])
    yield _NAMED_SCHEMA.empty_table()
    kept_rows = _row_of(table["kept_at"].to_numpy())
    for chunk, where in runs(table["kept_chunk"].to_numpy()):
        sources = staged.read(chunk, ["row", "source"])
        index = np.searchsorted(sources["row"].to_numpy(), kept_rows[where])
        part = table.slice(where.start, where.stop - where.start)
        at = part["at"].to_numpy()
        columns = {
            "chunk": (at >> _ROW_BITS).astype(np.int64),
            "row": _row_of(at),
            "reason": part["reason"],
            "kept_id": part["kept_id"],
            "detail": sources["source"].take(pa.array(index)),
        }
        yield pa.table(columns, schema=_NAMED_SCHEMA)


def _write_dropped(uri: str, folder: str, table: pa.Table) -> Iterator[pa.Table]:
    """Write the dropped rows of whole chunks. A row that met a near one by several keys is there as often."""
    table = table.sort_by([(name, "ascending") for name in ("chunk", "row", "kept_id")]).combine_chunks()
    yield _COUNT_SCHEMA.empty_table()
    store = open_store(uri)
    names = pa.array(REASONS)
    for chunk, where in runs(table["chunk"].to_numpy()):
        part = table.slice(where.start, where.stop - where.start)
        rows = part["row"].to_numpy()
        part = part.filter(pa.array(np.append(True, rows[1:] != rows[:-1])))
        reason = names.take(part["reason"].combine_chunks())
        dropped = pa.table([part["row"], reason, part["detail"]], schema=DROPPED_SCHEMA).combine_chunks()
        with scratch_folder() as temporary:
            path = temporary / "dropped"
            pq.write_table(dropped, path)
            store.put_file(dropped_name(folder, chunk), path)
        codes, counts = np.unique(part["reason"].to_numpy(), return_counts=True)
        columns = {"chunk": np.full(codes.size, chunk), "reason": codes, "rows": counts}
        yield pa.table(columns, schema=_COUNT_SCHEMA)


def _row_of(at: np.ndarray) -> np.ndarray:
    return (at & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _source(staged: StagedRows, at: np.uint64) -> str:
    chunk, row = int(at) >> 32, int(at) & 0xFFFFFFFF
    table = staged.read(chunk, ["row", "source"])
    return table["source"][int(np.searchsorted(table["row"].to_numpy(), row))].as_py()
