"""The scalar event of every applied step, with what follows from the steps before it.

All tensors of a step cross to the host in one transfer; nothing here asks the device a second time.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cluster.events import EventLog
from system.config import TrainConfig
from system.telemetry.mfu import MfuMeter

Source = Callable[[int], Mapping[str, float]]
"""Further values, after so many applied steps. Called by the training loop: it must not wait for anything."""

_WINDOW = 200
_RANKS_EVERY = 50


class StepRecorder:
    """Of the first rank."""

    def __init__(
        self, events: EventLog, config: TrainConfig, processes: int, sources: Sequence[Source]
    ) -> None:
        self._events, self._steps, self._batch = events, config.run.steps, config.data.global_batch
        self._sources = tuple(sources)
        peak = config.telemetry.peak_tflops
        self._mfu = None
        if peak is not None:
            self._mfu = MfuMeter(config.model, self._batch, 1e12 * peak * processes)
        self._step_times: deque[float] = deque(maxlen=_WINDOW)
        self._wall_times: deque[float] = deque(maxlen=_WINDOW)
        self._work_W: list[float] = []
        self._work_steps = 0

    def record(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        work_W: Sequence[float],
        tokens_BL: Tensor,
        *,
        data_seconds: float,
        step_seconds: float,
    ) -> dict[str, Any]:
        """Log `step`, the number of applied steps, and return what was logged.

        Args:
            tensors: scalars on any one device.
            values: of the host; those that are None are left out.
            work_W: how long each rank has worked on the step before; see `WorkClock`.
            tokens_BL: captions of this rank, in host memory.
        """
        flat = torch.stack([tensor.reshape(()) for tensor in tensors.values()]).tolist()
        wall = step_seconds + data_seconds
        self._step_times.append(step_seconds)
        self._wall_times.append(wall)
        ordered = sorted(self._step_times)
        left = self._steps - step
        everything: dict[str, Any] = {
            **dict(zip(tensors, flat, strict=True)),
            **{name: value for name, value in values.items() if value is not None},
            "steps_left": left,
            "left_seconds": left * sum(self._wall_times) / len(self._wall_times),
            "pairs_per_second": self._batch / wall,
            "data_seconds": data_seconds,
            "step_seconds": step_seconds,
            "step_p50_seconds": ordered[len(ordered) // 2],
            "step_p99_seconds": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
            **self._ranks(step, work_W),
        }
        if self._mfu is not None:
            everything["mfu"] = self._mfu.mfu(tokens_BL, wall)
        for source in self._sources:
            everything |= source(step)
        self._events.scalar(step, **everything)
        return everything

    def _ranks(self, step: int, work_W: Sequence[float]) -> dict[str, float]:
        slowest = max(range(len(work_W)), key=work_W.__getitem__)
        typical = median(work_W)
        if typical <= 0:  # no step before this one
            return {}
        self._work_W = [a + b for a, b in zip(self._work_W or [0.0] * len(work_W), work_W, strict=True)]
        self._work_steps += 1
        if self._work_steps == _RANKS_EVERY:
            means = [round(total / self._work_steps, 6) for total in self._work_W]
            self._events.instant("rank_times", step=step, steps=self._work_steps, seconds=means)
            self._work_W, self._work_steps = [], 0
        return {
            "slowest_rank": slowest,
            "slowest_rank_seconds": work_W[slowest],
            "rank_skew": work_W[slowest] / typical,
        }
