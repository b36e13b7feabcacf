"""What is in a data set: counts, quantiles, and histograms as JSON and as one picture.

Every index is read and no image. Values are counted in bins, never collected, so memory stays the same for
any number of samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import DatasetManifest, load_dataset, load_index
from data_pipeline.records import ShardInfo
from data_pipeline.upkeep.histogram import Histogram
from data_pipeline.upkeep.scan import Progress, in_order, pc
from data_pipeline.upkeep.takedown import load_tombstones

ASPECT_UNIT = 1000
"""Aspect ratios (width over height) are counted in thousandths."""
_WORKERS = 4


COLUMNS = ("width", "height", "short_side", "aspect", "image_bytes", "caption_length", "caption_words")
"""What is counted of every sample: pixels, thousandths, bytes of the stored image, characters, words."""


def dataset_stats(uri: str, progress: Progress | None = None) -> tuple[dict[str, Any], dict[str, Histogram]]:
    """Sizes of the data set with quantiles over all its samples, and the histograms behind them: those of
    COLUMNS, and `samples_per_shard`.

    Samples that tombstones take out are counted under `removed` and are in the histograms. Raises as
    `load_dataset` and `load_index`.
    """
    dataset, store = load_dataset(uri), open_store(uri)
    histograms = {name: Histogram() for name in (*COLUMNS, "samples_per_shard")}

    def measure(shard: ShardInfo) -> dict[str, np.ndarray]:
        return _measure(store, shard)

    for done, columns in enumerate(in_order(measure, dataset.shards, _WORKERS), start=1):
        for name, values in columns.items():
            histograms[name].add(values)
        histograms["samples_per_shard"].add(np.array([len(columns["width"])]))
        if progress is not None:
            progress(done, len(dataset.shards), f"{histograms['width'].total} samples")
    return _summary(dataset, store, histograms), histograms


def write_stats(stats: dict[str, Any], histograms: dict[str, Histogram], folder: Path) -> tuple[Path, Path]:
    """Write `stats.json` and `stats.png` into the local `folder`; returns their paths.

    In the JSON `histograms` has for each name the list of [smallest value of the bin, count].
    """
    from data_pipeline.upkeep.stats_figure import draw  # matplotlib, which the table alone does not need

    folder.mkdir(parents=True, exist_ok=True)
    document = {**stats, "histograms": {name: h.bins() for name, h in histograms.items()}}
    paths = folder / "stats.json", folder / "stats.png"
    paths[0].write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    draw(stats, histograms, paths[1])
    return paths


def _measure(store: ObjectStore, shard: ShardInfo) -> dict[str, np.ndarray]:
    index = load_index(store, shard, ["width", "height", "image_size", "caption"])
    width, height = index["width"].to_numpy(), index["height"].to_numpy()
    captions = index["caption"]
    words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(captions)))
    return {
        "width": width,
        "height": height,
        "short_side": np.minimum(width, height),
        "aspect": np.rint(ASPECT_UNIT * width / np.maximum(height, 1)).astype(np.int64),
        "image_bytes": index["image_size"].to_numpy(),
        "caption_length": _numbers(pc.utf8_length(captions)),
        "caption_words": _numbers(words),
    }


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.int64)


def _summary(
    dataset: DatasetManifest, store: ObjectStore, histograms: dict[str, Histogram]
) -> dict[str, Any]:
    return {
        "uri": dataset.uri,
        "digest": dataset.digest,
        "format": dataset.format,
        "samples": dataset.num_samples,
        "removed": len(load_tombstones(store)),
        "shards": len(dataset.shards),
        "bytes": sum(entry.size for entry in dataset.files.values()),
        "rows_in": dataset.counts["rows_in"],
        "dropped": dataset.dropped,
        **{name: histogram.summary() for name, histogram in histograms.items()},
    }
