"""The search for near hashes against comparing everything, and the laws of its bands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError
from data_pipeline.job import near
from data_pipeline.job.near import band_keys, best_extra_bands, smallest_near


def naive(hashes: np.ndarray, ids: np.ndarray, groups: np.ndarray, radius: int) -> list[int]:
    found = []
    for i in range(hashes.size):
        hits = [
            j
            for j in range(hashes.size)
            if ids[j] < ids[i]
            and groups[j] == groups[i]
            and (int(hashes[i]) ^ int(hashes[j])).bit_count() <= radius
        ]
        found.append(min(hits, key=lambda j: ids[j], default=-1))
    return found


def crowd(rng: np.random.Generator, count: int, flips: int) -> np.ndarray:
    """Different hashes that are all within `flips` bits of one of three centres."""
    bits = rng.integers(0, 64, (count, flips)).astype(np.uint64)
    flipped = np.where(rng.random((count, flips)) < 0.4, np.uint64(1) << bits, np.uint64(0))
    noise = np.bitwise_xor.reduce(flipped, axis=1)
    centres = rng.integers(0, 2**64, 3, np.uint64)
    return np.unique(centres[rng.integers(0, 3, count)] ^ noise)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63)))
def test_hashes_within_the_radius_share_a_key_whatever_the_bands(
    radius: int, extra: int, value: int, flips: set[int]
) -> None:
    other = value ^ sum(1 << bit for bit in sorted(flips)[:radius])
    pair = np.array([value, other], np.uint64)
    assert any(key[0] == key[1] for key in band_keys(pair, np.arange(64), radius, extra))


@pytest.mark.parametrize("refine_rows", [2048, 4])
@pytest.mark.parametrize("radius", [1, 3, 6])
def test_the_search_finds_what_comparing_everything_finds(
    radius: int, refine_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "_REFINE_ROWS", refine_rows)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        hashes = crowd(rng, 150, 6)
        ids = rng.permutation(10**6)[: hashes.size]
        groups = rng.integers(0, rng.integers(1, 5), hashes.size)
        found = smallest_near(hashes, ids, groups, radius)
        assert found.tolist() == naive(hashes, ids, groups, radius)
        assert (found >= 0).any(), "a test without a hit shows nothing"


def test_a_large_crowd_is_searched_by_its_own_bands_and_gives_the_same() -> None:
    rng = np.random.default_rng(1)
    hashes = crowd(rng, 6000, 9)
    ids = rng.permutation(hashes.size)
    group = np.zeros(hashes.size, np.int64)
    order = np.argsort(ids)
    expected = np.full(hashes.size, -1)
    for position, i in enumerate(order):
        smaller = order[:position]
        hits = np.flatnonzero(np.bitwise_count(hashes[smaller] ^ hashes[i]) <= 3)
        if hits.size:
            expected[i] = smaller[hits[0]]
    assert smallest_near(hashes, ids, group, 3).tolist() == expected.tolist()


def test_a_crowd_that_would_take_for_ever_is_an_error_that_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(near, "MAX_COMPARISONS", 10_000)
    monkeypatch.setattr(near, "_REFINE_ROWS", 100)
    monkeypatch.setattr(near, "_DEEPEST", 0)  # as if all bands had been tried
    words = np.arange(4096, dtype=np.uint64)
    hashes = words[np.bitwise_count(words) % 2 == 0]  # no two within 1
    ids = np.arange(hashes.size)
    with pytest.raises(DataError, match="near_radius"):
        smallest_near(hashes, ids, np.zeros(hashes.size, np.int64), 1)
    assert (smallest_near(hashes, ids, ids // 100, 1) == -1).all(), "many small groups are no such crowd"


def test_more_rows_get_more_selective_keys() -> None:
    chosen = [best_extra_bands(10**n, 64, 3) for n in range(1, 11)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] >= 2
    assert best_extra_bands(10**6, 2, 3) == 0, "no bands without bits"
