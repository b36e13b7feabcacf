"""Event logs as a trainer leaves them, with times of our choosing: kills, rewinds, torn and missing parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

START = 1_790_000_000.0
HOSTILE = '<img src=x onerror=alert(1)> & "quotes"'
SCALARS = ("image_text", "text_image", "distill", "mlm", "lr", "grad_norm", "codeword_use")


class Replay:
    """Writes the log of one run at `folder`. `now` is the time of the next event, in Unix seconds."""

    def __init__(self, folder: Path, start: float = START) -> None:
        self.folder, self.now = folder, start
        self._lines: dict[tuple[int, int], list[str]] = {}
        self._segments: dict[tuple[int, int], int] = {}
        self._seq: dict[tuple[int, int], int] = {}

    def put(self, attempt: int, kind: str, name: str, rank: int = 0, **facts: Any) -> None:
        key = attempt, rank
        seq = self._seq.get(key, 0)
        self._seq[key] = seq + 1
        header = {"t": self.now, "attempt": attempt, "rank": rank, "seq": seq, "kind": kind, "name": name}
        self._lines.setdefault(key, []).append(json.dumps({**header, **facts}))

    def start(self, attempt: int, resumed: int | None = None, ranks: int = 2, **config: Any) -> None:
        claim = self.folder / f"attempts/attempt-{attempt:04d}.json"
        claim.parent.mkdir(parents=True, exist_ok=True)
        claim.write_text("{}")
        facts = {"processes": ranks, "zero_stage": 1, "precision": "bf16", "resumed_step": resumed}
        for rank in range(ranks):
            self.put(attempt, "instant", "attempt_started", rank, **facts)
        self.put(attempt, "instant", "attempt_config", config={"run": {"steps": 60}, "engine": config})

    def steps(self, attempt: int, first: int, last: int, ranks: int = 2) -> None:
        """A second each, of which a tenth is waiting."""
        for step in range(first, last + 1):
            self.now += 1.0
            values: dict[str, Any] = {name: (5.0 + k) / step for k, name in enumerate(SCALARS)}
            values |= {"pairs_per_second": 24.0, "data_seconds": 0.1, "step_seconds": 0.9}
            loss = 9.0 / step + 0.25 * attempt
            self.put(attempt, "scalar", "step", step=step, loss=loss, slot=24 * (step - 1), **values)
            if step % 10 == 0:
                self.put(
                    attempt, "instant", "rank_times", step=step, seconds=[0.9 + rank for rank in range(ranks)]
                )

    def commit(self, attempt: int, step: int) -> None:
        facts = {"seconds": 0.5, "stall_seconds": 0.1, "bytes": 1 << 20}
        self.put(attempt, "instant", "checkpoint_committed", step=step, **facts)

    def end(self, attempt: int, code: int = 0, reason: str = "finished", ranks: int = 2) -> None:
        for rank in range(ranks):
            self.put(attempt, "instant", "attempt_ended", rank, exit_code=code, reason=reason)

    def flush(self) -> None:
        """Write what was put since the last time, as the next segment of each rank."""
        for (attempt, rank), lines in self._lines.items():
            number = self._segments.get((attempt, rank), 0)
            self._segments[attempt, rank] = number + 1
            path = self.segment(attempt, rank, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
        self._lines = {}

    def segment(self, attempt: int, rank: int, number: int) -> Path:
        return self.folder / f"events/attempt-{attempt:04d}/rank-{rank:05d}/segment-{number:06d}.jsonl"


def write_killed_and_rewound(folder: Path) -> None:
    """60 steps in three attempts: one killed after step 40 and gone on from 20, one preempted after 55 and
    gone on from 40 (its checkpoint was damaged)."""
    log = Replay(folder)
    log.start(1, zero_stage=1)
    log.steps(1, 1, 20)
    log.commit(1, 20)
    log.flush()
    log.steps(1, 21, 40)
    log.flush()
    log.now += 30
    log.start(2, resumed=20, zero_stage=2)
    log.steps(2, 21, 40)
    log.commit(2, 40)
    log.steps(2, 41, 55)
    log.put(2, "instant", "step_refused", step=55, reason=f"non-finite gradient {HOSTILE}")
    log.commit(2, 55)
    log.end(2, 75, "Preempted: stopped at step 55")
    log.flush()
    log.now += 60
    log.put(3, "instant", "checkpoint_quarantined", step=55, problems=["a file is short"])
    log.start(3, resumed=40, zero_stage=2)
    log.steps(3, 41, 60)
    log.commit(3, 60)
    log.end(3)
    log.flush()
    config = {"run": {"steps": 60}, "data": {"uri": "somewhere/data", "global_batch": 24}}
    (folder / "config.json").write_text(json.dumps({"config": config}))
