"""Raw image-text input, made on the spot: tars as img2dataset writes them, tables as LAION does."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colour picture that differs by seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    """The image as bytes of a file."""
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def members(key: str, seed: int, width: int = 96, height: int = 64) -> list[tuple[str, bytes]]:
    """The three files of one good sample."""
    return [
        (f"{key}.jpg", encode(noise(width, height, seed))),
        (f"{key}.txt", f"caption of {key}".encode()),
        (f"{key}.json", json.dumps({"key": key, "url": f"https://example.org/{key}.jpg"}).encode()),
    ]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A tar with a float time stamp, so a pax header, per member, as the webdataset library writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            info.mtime = 1700000000.25
            tar.addfile(info, io.BytesIO(payload))
    return path


def write_csv(path: Path, rows: Iterable[Iterable[str]], delimiter: str = ",", end: str = "\n") -> Path:
    """A csv or tsv file as Python's csv module writes it; packed if the name ends in .gz."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, columns: dict[str, Any], rows_per_group: int = 1000) -> Path:
    """A Parquet file in row groups, with the columns as lists or Arrow arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def laion(count: int, first: int = 0) -> dict[str, Any]:
    """Columns of a table as LAION writes it."""
    numbers = range(first, first + count)
    return {
        "SAMPLE_ID": pa.array(numbers, pa.int64()),
        "URL": [f"https://example.org/{i}.jpg" for i in numbers],
        "TEXT": [f"caption {i}" for i in numbers],
        "WIDTH": pa.array([640] * count, pa.int32()),
        "NSFW": ["UNLIKELY" if i % 3 else "UNSURE" for i in numbers],
        "similarity": [0.2 + i % 20 / 100 for i in numbers],
        "punsafe": pa.array([None if i % 7 == 0 else i % 10 / 10 for i in numbers], pa.float64()),
    }
