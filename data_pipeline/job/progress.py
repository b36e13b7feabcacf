"""How far a preprocess job is: counts, rate and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from data_pipeline.job.ledger import StageRecord

Report = Callable[[dict[str, Any]], None]


class Progress:
    """Counts tasks and rows, and calls `report` at the start of each stage and after every task."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._stage = ""
        self._done = self._total = self._skipped = 0
        self._rows = self._kept = 0
        self._rows_here = 0  # that this run has done in this stage
        self._start = 0.0

    def begin(
        self, stage: str, total: int, skipped: int = 0, known: Iterable[StageRecord] | None = None
    ) -> None:
        """A stage of `total` tasks begins, `skipped` of which an earlier run has done. `known` are the rounds
        that are staged so far."""
        if known is not None:
            self._rows = self._kept = 0
            for record in known:
                self._count(record)
        self._stage, self._total, self._skipped, self._done = stage, total, skipped, skipped
        self._rows_here = 0
        self._start = time.monotonic()
        self._tell()

    def staged(self, record: StageRecord) -> None:
        """A round of a chunk is done."""
        self._count(record)
        self._step(record.rows_in)

    def selected(self, rows: int, kept: int) -> None:
        """Of all `rows`, so many are kept, now that duplicates are known."""
        self._rows, self._kept = rows, kept
        self._step(rows)

    def written(self, samples: int) -> None:
        """A shard is done."""
        self._step(samples)

    def committed(self) -> None:
        """The data set is there."""
        self._step(0)

    def state(self) -> dict[str, Any]:
        """What `report` gets: stage (stage, retry, select, write or commit), done and total tasks of it,
        skipped (those of them that an earlier run had done); rows decided so far, of the whole input, and how
        many of them are kept and dropped; rows_per_second of this run in this stage, and seconds_left in it
        (None while that cannot be told)."""
        seconds = time.monotonic() - self._start
        fresh = self._done - self._skipped
        left: float | None = 0.0
        if self._done < self._total:
            left = (self._total - self._done) * seconds / fresh if fresh else None
        return {
            "stage": self._stage,
            "done": self._done,
            "total": self._total,
            "skipped": self._skipped,
            "rows": self._rows,
            "kept": self._kept,
            "dropped": self._rows - self._kept,
            "rows_per_second": self._rows_here / seconds if seconds > 0 else 0.0,
            "seconds_left": left,
        }

    def _count(self, record: StageRecord) -> None:
        """A later round decides again on rows that an earlier one had dropped."""
        self._rows += record.rows_in if record.round == 0 else 0
        self._kept += record.kept

    def _step(self, rows: int) -> None:
        self._done += 1
        self._rows_here += rows
        self._tell()

    def _tell(self) -> None:
        if self._report is not None:
            self._report(self.state())
