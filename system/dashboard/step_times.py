"""The steps of a run as the goodput ledger needs them, a bounded number of them."""

from typing import Any

MOST = 8_192
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
        self._apart = True
        self.entries: list[dict[str, Any]] = []
        """Events named "step"; one that is `apart` must not be joined to the one before."""

    def add(self, events: list[dict[str, Any]]) -> None:
        """Events of the first rank, in the order of the log."""
        for event in events:
            if event["name"] in _OTHERS:
                self._apart = True
            elif event["name"] == "step":
                self._add_step(event)
        if len(self.entries) > self._most:
            self._join(self._most // 2)
        if len(self.entries) > self._most:  # very many events between steps
            for entry in self.entries:
                entry["apart"] = False
            self._join(self._most // 2)

    def _add_step(self, event: dict[str, Any]) -> None:
        entry = {key: event[key] for key in ("t", "attempt", "rank", "seq", "kind", "name", "step")}
        for key in ("step_seconds", "data_seconds"):
            entry[key] = _number(event.get(key))
        self.entries.append({**entry, "apart": self._apart})
        self._apart = False

    def _join(self, wanted: int) -> None:
        """Join neighbours in pairs, again and again, until `wanted` are left or none can be joined."""
        before = len(self.entries) + 1
        while wanted < len(self.entries) < before:
            before = len(self.entries)
            joined: list[dict[str, Any]] = []
            single = False  # the last of `joined` may take one more
            for entry in self.entries:
                last = joined[-1] if joined else None
                first = last is None or last["attempt"] != entry["attempt"]
                if last is None or first or not single or entry["apart"]:
                    joined.append(entry)
                    single = not first
                else:
                    sums = {key: last[key] + entry[key] for key in ("step_seconds", "data_seconds")}
                    joined[-1] = {**entry, **sums, "apart": last["apart"]}
                    single = False
            self.entries = joined


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and value == value else 0.0
