"""Series of bounded size: what a scalar was at each step of each attempt, and what a screen shows of it.

Shapes: N rows.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

CAPACITY = 1 << 17
"""Rows of a series, about: 3 MB, and 60 times the width of a screen."""
_RAW_SHARE = 8
"""This part of the rows, the newest, is never thinned."""


@dataclass(frozen=True)
class Trace:
    """One drawn line."""

    stretch: int
    """Number of the stretch that it is of; 0 for the live line, which is of all."""
    steps: list[int]
    values: list[float | None]
    """None where the value was not finite."""


class Column:
    """One scalar of a run, stretch by stretch: one of rising steps, an attempt or its part between rewinds.

    Beyond `capacity` rows neighbours of a stretch become their lowest and their highest, over as many steps
    everywhere but among the newest: the memory is bounded, no spike is lost, and what is kept are values of
    the log.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._rows = 0
        self._settled = 0
        """Rows that are thinned, or would be; each two of them stand for `_thinned` of the log."""
        self._thinned = 2
        self._step = np.empty(1024, np.int64)
        self._stretch = np.empty(1024, np.int32)
        self._value = np.empty(1024, np.float64)
        self.not_finite = 0
        """Values of the log that were nan or infinite."""

    @property
    def nbytes(self) -> int:
        return self._step.nbytes + self._stretch.nbytes + self._value.nbytes

    def extend(self, steps: Sequence[int], stretch: int, values: Sequence[float]) -> None:
        new = np.asarray(values, np.float64)
        self.not_finite += int(np.count_nonzero(~np.isfinite(new)))
        end = self._rows + len(new)
        if end > len(self._value):
            self._grow(end)
        self._step[self._rows : end] = steps
        self._stretch[self._rows : end] = stretch
        self._value[self._rows : end] = new
        self._rows = end
        raw = self._capacity // _RAW_SHARE
        if self._rows - self._settled > raw:
            settled = self._rows - raw // 2
            if self._thinned > 2:
                self._thin(self._settled, settled, self._thinned)
            else:
                self._settled = settled
        while self._settled > self._capacity - raw:
            self._thin(0, self._settled, 4)
            self._thinned *= 2

    def live_values(self, limits: Mapping[int, float]) -> np.ndarray:
        """The values that count, as far as they are kept."""
        step, stretch, value = self._window(0, 1 << 62)
        return value[step < self._limits(stretch, limits)]

    def live(self, limits: Mapping[int, float], first: int, last: int, points: int) -> Trace:
        """Steps from `first` to `last` that were not trained again, in about `points` points. `limits` is by
        stretch: the step from which a newer one counts."""
        step, stretch, value = self._window(first, last)
        keep = step < self._limits(stretch, limits)
        step, value = step[keep], value[keep]
        return _trace(0, step, value, points)

    def superseded(self, limits: Mapping[int, float], first: int, last: int, points: int) -> Iterator[Trace]:
        """What was trained again later: one line per stretch that lost steps in this window."""
        step, stretch, value = self._window(first, last)
        lost = step >= self._limits(stretch, limits)
        step, stretch, value = step[lost], stretch[lost], value[lost]
        for number in np.unique(stretch):
            own = stretch == number
            yield _trace(int(number), step[own], value[own], points)

    def _window(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        step = self._step[: self._rows]
        inside = (step >= first) & (step <= last)
        return step[inside], self._stretch[: self._rows][inside], self._value[: self._rows][inside]

    def _limits(self, stretch: np.ndarray, limits: Mapping[int, float]) -> np.ndarray:
        table = np.full(int(stretch.max(initial=0)) + 1, np.inf)
        for number, limit in limits.items():
            if number < len(table):
                table[number] = limit
        return table[stretch]

    def _grow(self, rows: int) -> None:
        size = max(rows, 2 * len(self._value))
        self._step, self._stretch, self._value = (
            np.concatenate([array[: self._rows], np.empty(size - self._rows, array.dtype)])
            for array in (self._step, self._stretch, self._value)
        )

    def _thin(self, start: int, end: int, size: int) -> None:
        """Of every `size` rows from `start` to `end` two stay; all before `end` are settled then."""
        edges = [start, *(start + 1 + np.flatnonzero(np.diff(self._stretch[start:end]))), end]
        kept = [a + extremes(self._value[a:b], size) for a, b in itertools.pairwise(edges)]
        kept = np.concatenate([np.arange(start), *kept, np.arange(end, self._rows)])
        self._settled = len(kept) - (self._rows - end)
        self._rows = len(kept)
        for name in ("_step", "_stretch", "_value"):
            old = getattr(self, name)
            new = np.empty(self._rows + 1024, old.dtype)
            new[: self._rows] = old[kept]
            setattr(self, name, new)


def extremes(value_N: np.ndarray, size: int) -> np.ndarray:
    """Rising places of the lowest and highest finite value of every `size` neighbours, and of the ends."""
    rows = len(value_N)
    finite_N = np.isfinite(value_N)
    low_N, high_N = np.where(finite_N, value_N, np.inf), np.where(finite_N, value_N, -np.inf)
    whole = rows // size * size
    start = np.arange(0, whole, size)
    low, high = (each_N[:whole].reshape(-1, size) for each_N in (low_N, high_N))
    kept = [start + low.argmin(1), start + high.argmax(1)]
    if whole < rows:
        kept.append(np.array([whole + low_N[whole:].argmin(), whole + high_N[whole:].argmax()]))
    return np.unique(np.concatenate([*kept, [0, rows - 1]]))


def _trace(stretch: int, step: np.ndarray, value: np.ndarray, points: int) -> Trace:
    if np.any(step[1:] < step[:-1]):  # a segment that came late
        order = np.argsort(step, kind="stable")
        step, value = step[order], value[order]
    if len(step) > points:
        kept = extremes(value, -(-2 * len(step) // points))
        step, value = step[kept], value[kept]
    return Trace(stretch, step.tolist(), finite(value))


def finite(values: np.ndarray) -> list[float | None]:
    """Plain floats, None for nan and infinity."""
    return [value if isfinite(value) else None for value in values.tolist()]
