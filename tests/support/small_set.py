"""Committed data sets with the fate of every source row, in either format: real shards, real rows files, tiny
images that nobody decodes. For what reads the books of a set; `small_dataset` has pictures."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.manifest import MANIFEST, Manifest, commit, file_entry, load
from cluster.store import open_store
from data_pipeline.job.ledger import digest
from data_pipeline.records import (
    DATASET_KIND,
    DATASET_VERSION,
    ROWS_SCHEMA,
    Sample,
    ShardFormat,
    sample_id,
    shard_names,
)
from data_pipeline.shards.shard_writer import write_shard

CHUNKS = 2


def original(source: str) -> bytes:
    """The image of a source row, before it was prepared."""
    return f"original of {source}".encode()


def small_sample(number: int, origin: str = "a.tar", **changes: Any) -> Sample:
    """Sample `number` of `origin`: 10 + number wide, 20 high, with number + 1 words of caption."""
    source = f"{origin}/{number:03d}"
    values: dict[str, Any] = {
        "id": sample_id(source),
        "key": f"{number:03d}",
        "source": source,
        "image": f"image {number} of {origin}".encode() * (number + 1),
        "extension": "jpg",
        "caption": " ".join(["é"] * (number + 1)),
        "width": 10 + number,
        "height": 20,
        "sha256": hashlib.sha256(original(source)).digest(),
        "url": f"https://example.org/{source}.jpg",
    }
    return Sample(**{**values, **changes})


def write_set(
    uri: str | Path,
    shard_sizes: Sequence[int] = (3, 2),
    dropped: Sequence[str] = ("small", "undecodable", "small"),
    *,
    origin: str = "a.tar",
    format: ShardFormat = "tar",
    changes: dict[int, dict[str, Any]] | None = None,
    details: dict[int, str] | None = None,
    recipe: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
) -> None:
    """Commit a set at `uri`.

    Samples count on through the shards; dropped rows, one per reason, have the sources `<origin>/lost-000`,
    `<origin>/lost-001` ... Rows are dealt to two chunks, so that a chunk has samples of several shards.
    `changes` are fields of single samples, `details` those of single dropped rows, `meta` takes the place of
    parts of the manifest's.
    """
    store = open_store(str(uri))
    files, shards, rows, first = [], [], [], 0
    with tempfile.TemporaryDirectory() as name:
        for shard, size in enumerate(shard_sizes):
            samples = [
                small_sample(n, origin, **(changes or {}).get(n, {})) for n in range(first, first + size)
            ]
            first += size
            paths = [Path(name, part) for part in shard_names(shard, format)]
            shards.append(vars(write_shard(samples, paths[0], paths[1], format)))
            files += [file_entry(path, path.name) for path in dict.fromkeys(paths)]
            rows += [kept_row(sample, shard, index) for index, sample in enumerate(samples)]
        for n, reason in enumerate(dropped):
            rows.append(dropped_row(f"{origin}/lost-{n:03d}", reason, (details or {}).get(n)))
        for chunk in range(CHUNKS):
            path = Path(name) / f"rows/rows-{chunk:06d}.parquet"
            write_rows(path, rows[chunk::CHUNKS], chunk)
            files.append(file_entry(path, f"rows/{path.name}"))
        for entry in files:
            store.put_file(entry.name, Path(name) / entry.name)
    reasons = Counter(dropped)
    recipe = recipe or {"transform": {"short_side": 224}}
    counts = {"rows_in": len(rows), "kept": first, "dropped": len(dropped)}
    counts |= {f"dropped/{reason}": n for reason, n in sorted(reasons.items())}
    document = {
        "recipe": recipe,
        "recipe_digest": digest(recipe),
        "inputs": {
            "chunks": CHUNKS,
            "bytes": 1000 + first,
            "digest": hashlib.sha256(origin.encode()).hexdigest(),
        },
        "counts": counts,
        "shards": shards,
        "format": format,
        **(meta or {}),
    }
    commit(store, Manifest(DATASET_KIND, DATASET_VERSION, tuple(files), document))


def kept_row(sample: Sample, shard: int, index: int) -> dict[str, Any]:
    """The row of a sample in ROWS_SCHEMA, but for chunk and row."""
    names = ("key", "source", "url", "id", "sha256")
    row = {name: getattr(sample, name) for name in names}
    return {**row, "fate": "kept", "retriable": False, "shard": shard, "index": index}


def dropped_row(source: str, reason: str, detail: str | None = None) -> dict[str, Any]:
    """The row of a dropped source row; those that timed out might pass another day."""
    return {
        "key": source.rpartition("/")[2],
        "source": source,
        "url": f"https://example.org/{source}.jpg",
        "fate": "dropped",
        "reason": reason,
        "detail": detail or f"it is {reason}",
        "retriable": reason == "timeout",
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]], chunk: int) -> None:
    """The rows file of a chunk."""
    path.parent.mkdir(exist_ok=True)
    numbered = [{**row, "chunk": chunk, "row": number} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(numbered, schema=ROWS_SCHEMA), path)


def reseal(folder: Path) -> None:
    """Commit the files as they are now: the manifest gets their sizes and checksums, and stays otherwise."""
    manifest = load(open_store(str(folder)), DATASET_KIND, DATASET_VERSION)
    files = tuple(file_entry(folder / entry.name, entry.name) for entry in manifest.files)
    (folder / MANIFEST).write_bytes(
        Manifest(manifest.kind, manifest.version, files, manifest.meta).to_bytes()
    )
