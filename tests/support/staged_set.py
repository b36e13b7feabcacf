"""Staged rows with planted duplicates, and what must become of them, in plain Python."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.job.dedup import DuplicateConfig
from data_pipeline.records import STAGED_SCHEMA, sample_id


@dataclass
class StagedSet:
    """Rows of a set that is not cut into chunks yet: dicts with the columns of STAGED_SCHEMA."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path, chunks: int) -> list[list[str]]:
        """Write them as `chunks` chunks of unequal size, one round each; returns the objects per chunk."""
        cuts = [
            0,
            *sorted(random.Random(chunks).choices(range(len(self.rows)), k=chunks - 1)),
            len(self.rows),
        ]
        names = []
        for chunk in range(chunks):
            rows = self.rows[cuts[chunk] : cuts[chunk + 1]]
            named = [{**row, "chunk": chunk, "row": number} for number, row in enumerate(rows)]
            name = f"staging/rows-{chunk:06d}.parquet"
            write_round(folder / name, named)
            names.append([name])
        return names


def write_round(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=STAGED_SCHEMA), path)


def staged_row(source: str, draw: random.Random, **values: Any) -> dict[str, Any]:
    """A row that has an image unlike any other, but for `values`."""
    row = {
        "key": source.rpartition("/")[2],
        "source": source,
        "url": f"https://example.org/{source}.jpg",
        "retriable": False,
        "id": sample_id(source),
        "sha256": draw.randbytes(32),
        "caption": f"a caption of {source}",
        "meta": "{}",
        "width": draw.randint(1, 500),
        "height": 256,
        "extension": "jpg",
        "image_file": "staging/chunk-000000.bin",
        "image_offset": draw.randint(0, 1 << 40),
        "image_size": 1000,
        "image_crc32": draw.getrandbits(32),
        "pixels": draw.randbytes(16),
        "perceptual": draw.getrandbits(64),
    }
    return {**row, **values}


def refused_row(source: str, reason: str) -> dict[str, Any]:
    row = {"key": source, "source": source, "retriable": reason == "timeout", "reason": reason}
    return {**row, "detail": f"about {source}"}


def planted(count: int, seed: int) -> StagedSet:
    """Random rows of which many are duplicates of earlier ones in one of all ways, chains included."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for number in range(count):
        source = f"tar-{number % 7}/{number:05d}"
        kind = draw.choice(["new"] * 6 + ["bytes", "pixels", "pair", "near", "near", "blank", "refused"])
        if kind == "refused":
            rows.append(refused_row(source, draw.choice(["undecodable", "timeout", "too_small"])))
            continue
        like = draw.choice(images) if images else {}
        values: dict[str, Any] = {}
        if kind == "blank":
            values = {"perceptual": draw.choice([0, 1, 3, 1 << 63])}
        elif kind == "bytes" and like:
            values = {name: like[name] for name in ("sha256", "pixels", "perceptual")}
        elif kind in ("pixels", "pair") and like:
            values = {name: like[name] for name in ("pixels", "perceptual")}
            values |= {"caption": like["caption"]} if kind == "pair" else {}
        elif kind == "near" and like:
            flips = draw.sample(range(64), draw.randint(0, 6))
            values = {"perceptual": like["perceptual"] ^ sum(1 << bit for bit in flips)}
        row = staged_row(source, draw, **values)
        rows.append(row)
        images.append(row)
    return StagedSet(rows)


def expected_drops(rows: list[dict[str, Any]], config: DuplicateConfig) -> dict[str, tuple[str, str]]:
    """(reason, source of the kept row) of each source that is a duplicate, by comparing everything."""
    left = sorted((row for row in rows if row.get("image_file")), key=lambda row: row["id"])
    drops: dict[str, tuple[str, str]] = {}
    for kind, columns in (("bytes", ["sha256"]), ("pixels", ["pixels"]), ("pair", ["pixels", "caption"])):
        if not getattr(config, kind):
            continue
        first: dict[Any, str] = {}
        for row in left:
            kept = first.setdefault(tuple(row[name] for name in columns), row["source"])
            if kept != row["source"]:
                drops[row["source"]] = (f"duplicate_{kind}", kept)
        left = [row for row in left if row["source"] not in drops]
    if config.near_radius is not None:
        for number, row in enumerate(left):
            for radius in (0, config.near_radius):  # a row with the same hash is named before others
                near = [
                    other["source"]
                    for other in left[:number]
                    if (row["perceptual"] ^ other["perceptual"]).bit_count() <= radius
                ]
                if near:
                    drops[row["source"]] = ("near_duplicate", near[0])
                    break
    return drops
