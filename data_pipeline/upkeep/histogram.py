"""A histogram of whole numbers in bounded memory."""

from __future__ import annotations

import numpy as np

QUANTILES = {"min": 0.0, "p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
_EXACT_BITS = 12


class Histogram:
    """Counts of whole numbers >= 0: each value below 4096 for itself, larger ones in 2048 bins per power of
    two, so that a bin is narrower than 0.05 % of what is in it (the layout of HdrHistogram, G. Tene)."""

    def __init__(self) -> None:
        self.counts = np.zeros(1, np.int64)
        self.total = 0
        self.sum = 0
        self.least: int | None = None
        self.most: int | None = None

    def add(self, values: np.ndarray) -> None:
        """Count whole numbers, int [n]."""
        if not len(values):
            return
        new = np.bincount(_bin(values.astype(np.int64)))
        if len(new) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(new) - len(self.counts)))
        self.counts[: len(new)] += new
        self.total += len(values)
        self.sum += int(values.sum())
        low, high = int(values.min()), int(values.max())
        self.least = low if self.least is None else min(low, self.least)
        self.most = high if self.most is None else max(high, self.most)

    def quantile(self, share: float) -> int:
        """The value at `share` of all, as numpy's method "nearest"; exact where bins are."""
        if self.least is None or self.most is None:
            raise ValueError("no values were counted")
        rank = int(np.round(share * (self.total - 1)))
        at = int(np.searchsorted(np.cumsum(self.counts), rank, side="right"))
        return int(np.clip(_start(np.array(at)), self.least, self.most))

    def summary(self) -> dict[str, float]:
        """Quantiles, mean and number."""
        if not self.total:
            return {}
        found: dict[str, float] = {name: self.quantile(share) for name, share in QUANTILES.items()}
        return {**found, "mean": round(self.sum / self.total, 3)}

    def bins(self) -> list[tuple[int, int]]:
        """(smallest value of the bin, count) of the bins that are not empty."""
        at = np.flatnonzero(self.counts)
        return list(zip(_start(at).tolist(), self.counts[at].tolist(), strict=True))


def _bin(values: np.ndarray) -> np.ndarray:
    """Number of the bin of each value, int64 [n]."""
    # floor(log2) by the exponent of a float64; above 2^53 it may round up, which no size of ours reaches.
    shift = np.maximum(np.frexp(values.astype(np.float64))[1] - _EXACT_BITS, 0).astype(np.int64)
    return (values >> shift) + (shift << (_EXACT_BITS - 1))


def _start(bins: np.ndarray) -> np.ndarray:
    """Smallest value of each bin."""
    half = 1 << (_EXACT_BITS - 1)
    shift = np.maximum(bins // half - 1, 0)
    return (bins - shift * half) << shift
