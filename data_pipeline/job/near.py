"""Exact search for near 64-bit hashes: which rows have one with a smaller id within a Hamming radius.

By the pigeonhole principle: if the bits are cut into r + k bands, two hashes that differ in at most r bits
agree on at least k whole bands. So every pair of near hashes shares one of the C(r + k, k) keys that name k
bands and their bits, and only rows with a common key are compared (Manku, Jain, Das Sarma: "Detecting
near-duplicates for web crawling", WWW 2007, use the same idea on sorted tables). k changes the cost alone,
never the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import comb

import numpy as np

from cluster.errors import DataError
from data_pipeline.keyed import mix

MAX_RADIUS = 16
MAX_COMPARISONS = 20_000_000_000
"""Of one group, about two minutes. Beyond it the images are so alike that a search by radius has no sense."""

_MOST_EXTRA = 4
_SPREAD_COST = 200.0  # moving one copy of a row between machines, in comparisons
_REFINE_COST = 20.0  # giving a row one more key in memory, in comparisons
_REFINE_ROWS = 2048  # groups up to this size are simply compared
_DEEPEST = 2


def best_extra_bands(count: int, num_bits: int, radius: int, copy_cost: float = _SPREAD_COST) -> int:
    """The k that is cheapest for `count` random hashes of `num_bits` bits; 0 stands for comparing all."""

    def cost(extra: int) -> float:
        key_bits = extra * num_bits // (radius + extra)
        return comb(radius + extra, extra) * count * (copy_cost + count / 2 ** (key_bits + 1))

    possible = [k for k in range(_MOST_EXTRA + 1) if radius + k <= num_bits]
    return min(possible, key=cost, default=0)


def band_keys(hashes: np.ndarray, bits: np.ndarray, radius: int, extra: int) -> Iterator[np.ndarray]:
    """The C(radius + extra, extra) keys of each hash, as uint64 arrays of its shape.

    `bits` are the positions of the bits to cut into bands; the hashes must agree on all others. Two hashes
    within the radius are equal in at least one of the arrays.
    """
    bands = np.array_split(bits.astype(np.uint64), radius + extra)
    masks = [np.bitwise_or.reduce(np.uint64(1) << band, initial=np.uint64(0)) for band in bands]
    for number, chosen in enumerate(combinations(masks, extra)):
        mask = np.bitwise_or.reduce(np.array(chosen, np.uint64), initial=np.uint64(0))
        yield mix(number, hashes & mask)


def smallest_near(hashes: np.ndarray, ids: np.ndarray, groups: np.ndarray, radius: int) -> np.ndarray:
    """For each row the number of the row with the smallest id in its group within the radius, or -1.

    hashes uint64 [n], ids and groups integers [n]; ids are unique, and only ids smaller than the row's own
    count. Returns int64 [n]. Raises DataError when a group is beyond MAX_COMPARISONS.
    """
    order = np.lexsort((ids, groups))
    found = _search(hashes[order], groups[order], radius, 0)
    result = np.full(hashes.size, -1, np.int64)
    hit = found >= 0
    result[order[hit]] = order[found[hit]]
    return result


def _search(hashes: np.ndarray, groups: np.ndarray, radius: int, depth: int) -> np.ndarray:
    """`smallest_near` of rows that are sorted by (group, id): positions of the first near row, or -1."""
    found = np.full(hashes.size, -1, np.int64)
    if hashes.size == 0:
        return found
    starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
    sizes = np.diff(np.append(starts, hashes.size))
    start = np.repeat(starts, sizes)
    large = (sizes > _REFINE_ROWS) & (depth < _DEEPEST)
    _compare(hashes, start, np.flatnonzero(~np.repeat(large, sizes)), radius, found)
    for begin, size in zip(starts[large], sizes[large], strict=True):
        inner = _refine(hashes[begin : begin + size], radius, depth)
        found[begin : begin + size] = np.where(inner >= 0, inner + begin, -1)
    return found


def _compare(hashes: np.ndarray, start: np.ndarray, rows: np.ndarray, radius: int, found: np.ndarray) -> None:
    """Compare `rows` with the first row of their groups, then with the second, ..., until each has a hit or
    has come to itself."""
    comparisons, turn = 0, 0
    rows = rows[rows > start[rows]]
    while rows.size:
        comparisons += rows.size
        if comparisons > MAX_COMPARISONS and turn > _REFINE_ROWS:
            raise DataError(
                f"near duplicates: {rows.size} different images, such as those of the hash "
                f"{int(hashes[rows[0]]):016x}, are too alike to be searched within radius {radius}; lower "
                "near_radius or set it to null"
            )
        pivots = start[rows] + turn
        near = np.bitwise_count(hashes[rows] ^ hashes[pivots]) <= radius
        found[rows[near]] = pivots[near]
        turn += 1
        rows = rows[~near & (rows > start[rows] + turn)]


def _refine(hashes: np.ndarray, radius: int, depth: int) -> np.ndarray:
    """`_search` of one large group, in the order of ids, by keys of the bits on which it is not agreed."""
    bits = np.flatnonzero((np.bitwise_or.reduce(hashes ^ hashes[0]) >> np.arange(64, dtype=np.uint64)) & 1)
    extra = best_extra_bands(hashes.size, bits.size, radius, _REFINE_COST)
    found = np.full(hashes.size, hashes.size, np.int64)
    for key in band_keys(hashes, bits, radius, extra):
        order = np.lexsort((np.arange(hashes.size), key))
        inner = _search(hashes[order], key[order], radius, depth + 1 if extra else _DEEPEST)
        hit = inner >= 0
        found[order[hit]] = np.minimum(found[order[hit]], order[inner[hit]])
    return np.where(found < hashes.size, found, -1)
