"""Statistics are those of the samples, counted in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.records import ShardFormat
from data_pipeline.upkeep.histogram import QUANTILES, Histogram
from data_pipeline.upkeep.stats import dataset_stats, write_stats
from data_pipeline.upkeep.takedown import remove_samples
from tests.support.small_set import small_sample, write_set


@given(st.lists(st.integers(0, 1 << 50), min_size=1, max_size=60))
def test_quantiles_are_exact_below_4096_and_within_a_bin_above(values: list[int]) -> None:
    histogram = Histogram()
    for start in range(0, len(values), 7):
        histogram.add(np.array(values[start : start + 7]))
    for share in QUANTILES.values():
        true = int(np.sort(values)[int(np.round(share * (len(values) - 1)))])
        found = histogram.quantile(share)
        assert found == true if true < 4096 else true * (1 - 1 / 2048) <= found <= true
    assert histogram.quantile(0.0) == min(values)
    assert sum(count for _, count in histogram.bins()) == len(values) == histogram.total
    assert histogram.summary()["mean"] == round(sum(values) / len(values), 3)


def test_memory_does_not_grow_with_the_values() -> None:
    histogram = Histogram()
    for seed in range(20):
        histogram.add(np.random.default_rng(seed).integers(0, 1 << 40, 50_000))
    assert histogram.counts.nbytes < 600_000
    assert histogram.total == 1_000_000


@pytest.mark.parametrize("format", get_args(ShardFormat))
def test_stats_are_those_of_the_samples(tmp_path: Path, format: ShardFormat) -> None:
    write_set(tmp_path, [3, 2], ("a", "b", "b"), format=format)
    remove_samples(str(tmp_path), "source", ["a.tar/001"], reason="", now=lambda: "")
    stats, histograms = dataset_stats(str(tmp_path))
    assert (stats["samples"], stats["removed"], stats["shards"], stats["rows_in"]) == (5, 1, 2, 8)
    assert stats["dropped"] == {"a": 1, "b": 2}
    sets = [p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "tombstones"]
    assert stats["bytes"] == sum(p.stat().st_size for p in sets if p.name != "manifest.json")
    assert stats["width"] == {"min": 10, "p05": 10, "p50": 12, "p95": 14, "max": 14, "mean": 12.0}
    assert stats["height"] == {**dict.fromkeys(QUANTILES, 20), "mean": 20.0}
    assert histograms["short_side"].bins() == histograms["width"].bins() == [(n, 1) for n in range(10, 15)]
    assert histograms["aspect"].bins() == [(500 + 50 * n, 1) for n in range(5)]
    assert histograms["caption_length"].bins() == [(2 * n + 1, 1) for n in range(5)]
    assert histograms["caption_words"].bins() == [(n + 1, 1) for n in range(5)]
    assert histograms["image_bytes"].bins() == [(len(small_sample(n).image), 1) for n in range(5)]
    assert histograms["samples_per_shard"].bins() == [(2, 1), (3, 1)]


@pytest.mark.parametrize("dropped", [(), ("small",), [f"reason-{n % 20}" for n in range(300)]])
def test_the_files_are_a_json_and_a_light_picture(tmp_path: Path, dropped: tuple[str, ...]) -> None:
    write_set(tmp_path / "set", [3, 2], dropped)
    stats, histograms = dataset_stats(str(tmp_path / "set"))
    table, picture = write_stats(stats, histograms, tmp_path / "out/deep")
    document = json.loads(table.read_text())
    assert document["histograms"]["width"] == [[n, 1] for n in range(10, 15)]
    assert {key: document[key] for key in stats} == json.loads(json.dumps(stats))
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 900
    assert bool((pixels[:3] == 255).all())
    assert float((pixels.max(axis=2) < 250).mean()) > 0.02
