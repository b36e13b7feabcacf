"""What sinks that draw curves over steps have in common."""

from system.sinks.feed import Event
from system.telemetry.metrics import by_event

_OF_STEP = tuple(metric for metric in by_event()["step"] if metric.kind != "counter" and metric.label is None)


def scalars_of(event: Event) -> dict[str, float]:
    """The registry's values of a step's event, `step` itself apart."""
    found = {metric.name: metric.value(event) for metric in _OF_STEP if metric.name != "step"}
    return {name: value for name, value in found.items() if value is not None}


class Rewinds:
    """Where a new stretch of steps begins: at an attempt's first step, and wherever the step number does not
    rise. From there on it supersedes what was logged before (`system/report/history.py` has the rule)."""

    def __init__(self) -> None:
        self._last: tuple[int, int] = (0, 0)

    def begins(self, event: Event) -> bool:
        attempt, step = event["attempt"], event["step"]
        before, self._last = self._last, (attempt, step)
        return attempt != before[0] or step <= before[1]
