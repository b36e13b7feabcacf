"""The steps of a run as the goodput ledger needs them, a bounded number of them."""

from typing import Any

MOST = 8_192


class StepTimes:
    """Steps of the first rank with their times. Beyond `most` entries neighbours become one longer step.

    Only steps that follow each other in the log without another event between are joined, and never the first
    of an attempt; so sums of time stay right, but for the part of one entry at the end of each attempt.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self.entries: list[dict[str, Any]] = []
        """Events named "step"; `since` is the `seq` of the first that an entry holds."""

    def add(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            entry = {key: event[key] for key in ("t", "attempt", "rank", "seq", "kind", "name", "step")}
            for key in ("step_seconds", "data_seconds"):
                entry[key] = _number(event.get(key))
            self.entries.append({**entry, "since": event["seq"]})
        while len(self.entries) > self._most and self._join():
            pass

    def _join(self) -> bool:
        before = len(self.entries)
        joined: list[dict[str, Any]] = []
        first = True
        for entry in self.entries:
            last = joined[-1] if joined else None
            starts_attempt = last is None or last["attempt"] != entry["attempt"]
            follows = last is not None and not starts_attempt and last["seq"] + 1 == entry["since"]
            if last is not None and follows and not first and not last.get("joined"):
                sums = {key: last[key] + entry[key] for key in ("step_seconds", "data_seconds")}
                joined[-1] = {**entry, **sums, "since": last["since"], "joined": True}
            else:
                joined.append(entry)
                first = starts_attempt
        for entry in joined:
            entry.pop("joined", None)
        self.entries = joined
        return len(joined) < before


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and value == value else 0.0
