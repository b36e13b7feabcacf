"""The steps of a run as the goodput ledger needs them, a bounded number of them."""

from typing import Any

MOST = 8_192
_LARGEST = 1 << 20
_OTHERS = frozenset(
    {"step_refused", "checkpoint_stall", "checkpoint_restored", "evaluation", "evaluation_failed"}
)
"""Other events of the ledger: steps before and after one of them stay apart."""


class StepTimes:
    """Steps of the first rank with their times. Beyond `most` entries neighbours become one longer step.

    The first step of an attempt stays alone, and so sums of time stay right but for the part of one entry at
    the end of each attempt.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._group = 1
        """Most steps of an entry."""
        self._apart = True
        self.entries: list[dict[str, Any]] = []
        """Events named "step": `apart` is not joined to the one before, `steps` is how many they are."""

    def add(self, events: list[dict[str, Any]]) -> None:
        """Events of the first rank, in the order of the log."""
        for event in events:
            if event["name"] in _OTHERS:
                self._apart = True
            elif event["name"] == "step":
                self._add_step(event)
        if len(self.entries) > self._most:
            self._join()
        while len(self.entries) > self._most:
            if self._group > _LARGEST:  # very many events between steps
                self.entries = [{**entry, "apart": False} for entry in self.entries]
                self._group = 1
            self._group *= 2
            self._join()

    def _add_step(self, event: dict[str, Any]) -> None:
        entry = {key: event[key] for key in ("t", "attempt", "rank", "seq", "kind", "name", "step")}
        for key in ("step_seconds", "data_seconds"):
            entry[key] = _number(event.get(key))
        first = not self.entries or self.entries[-1]["attempt"] != event["attempt"]
        self.entries.append({**entry, "steps": 1, "apart": first or self._apart})
        self._apart = first

    def _join(self) -> None:
        joined: list[dict[str, Any]] = []
        for entry in self.entries:
            last = joined[-1] if joined and not entry["apart"] else None
            if (
                last is None
                or last["attempt"] != entry["attempt"]
                or last["steps"] + entry["steps"] > self._group
            ):
                joined.append(entry)
            else:
                sums = {key: last[key] + entry[key] for key in ("steps", "step_seconds", "data_seconds")}
                joined[-1] = {**entry, **sums, "apart": last["apart"]}
        self.entries = joined


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and value == value else 0.0
