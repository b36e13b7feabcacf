"""What the ranks measured, as a grid of rank by time: who is slower than the others, and since when."""

from typing import Any

import numpy as np

COLUMNS = 120
MOST_RANKS = 4_096
MOST_MEASURES = 16
_FIRST_SECONDS = 1.0


class _Grid:
    """Sum and number of one measure by rank and column of time."""

    def __init__(self) -> None:
        self.sum = np.zeros((1, COLUMNS))
        self.number = np.zeros((1, COLUMNS), np.int64)

    def add(self, rank: int, column_N: np.ndarray, value_N: np.ndarray) -> None:
        if rank >= len(self.sum):
            more = max(rank + 1, 2 * len(self.sum)) - len(self.sum)
            self.sum = np.vstack([self.sum, np.zeros((more, COLUMNS))])
            self.number = np.vstack([self.number, np.zeros((more, COLUMNS), np.int64)])
        np.add.at(self.sum[rank], column_N, value_N)
        np.add.at(self.number[rank], column_N, 1)

    def halve(self) -> None:
        for array in (self.sum, self.number):
            array[:, : COLUMNS // 2] = array[:, 0::2] + array[:, 1::2]
            array[:, COLUMNS // 2 :] = 0


class RankGrid:
    """Means of every measure in `COLUMNS` columns, twice as wide when the time is over their end."""

    def __init__(self) -> None:
        self._grids: dict[str, _Grid] = {}
        self._start: float | None = None
        self._seconds = _FIRST_SECONDS
        self._ranks = 0

    @property
    def nbytes(self) -> int:
        return sum(grid.sum.nbytes + grid.number.nbytes for grid in self._grids.values())

    def add(self, events: list[dict[str, Any]]) -> None:
        """Take in the times that events of one rank measured: their fields named `...seconds`, and the
        `seconds` of all ranks in a `rank_times` event."""
        if self._start is None:
            self._start = events[0]["t"]
        self._widen(max(event["t"] for event in events) - self._start)
        for event in events:
            times = event.get("seconds") if event["name"] == "rank_times" else None
            for rank, seconds in enumerate(times if isinstance(times, list) else ()):
                if isinstance(seconds, int | float):
                    self._put("step work", rank, [(event["t"], seconds)])
        rank = events[0]["rank"]
        for name in set().union(*events):
            if not name.endswith("seconds"):
                continue
            rows = [(e["t"], e[name]) for e in events if isinstance(e.get(name), int | float)]
            if rows:
                self._put(name, rank, rows)

    def _put(self, name: str, rank: int, rows: list[tuple[float, float]]) -> None:
        if not 0 <= rank < MOST_RANKS or (name not in self._grids and len(self._grids) >= MOST_MEASURES):
            return
        self._ranks = max(self._ranks, rank + 1)
        time_N, value_N = np.array(rows).T
        column_N = np.maximum(0, (time_N - self._start) // self._seconds).astype(np.int64)
        self._grids.setdefault(name, _Grid()).add(rank, column_N, value_N)

    def _widen(self, seconds: float) -> None:
        while seconds >= self._seconds * COLUMNS:
            for grid in self._grids.values():
                grid.halve()
            self._seconds *= 2

    def view(self) -> dict[str, Any]:
        """start, seconds of a column, ranks, and per measure that two ranks have its means [rank][column]."""
        measures = {}
        for name, grid in self._grids.items():
            if np.count_nonzero(grid.number.sum(1)) < 2:
                continue
            number = grid.number[: self._ranks]
            used = int(np.flatnonzero(number.sum(0)).max()) + 1
            rows = zip(grid.sum[:, :used].tolist(), number[:, :used].tolist(), strict=False)
            measures[name] = [
                [round(s / n, 6) if n else None for s, n in zip(*row, strict=True)] for row in rows
            ]
        return {
            "start": self._start,
            "seconds": self._seconds,
            "ranks": self._ranks,
            "measures": measures,
        }
