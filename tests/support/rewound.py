"""The events of a run that went back many times."""

from typing import Any

Event = dict[str, Any]


def rewound_log(rewinds: int) -> list[Event]:
    """A run that begins anew `rewinds` times, by turns as a new attempt and within one, each time some steps
    back; the loss of a step names the stretch that trained it. In the order of the log."""
    events: list[Event] = []
    attempt, first, seq = 1, 1, 0
    for stretch in range(rewinds + 1):
        last = first + 7 + stretch % 5
        for step in range(first, last + 1):
            values = {"loss": float(stretch), "step_seconds": 0.1, "data_seconds": 0.01}
            header = {"t": 1000.0 + len(events), "attempt": attempt, "rank": 0, "seq": seq, "kind": "scalar"}
            events.append({**header, "name": "step", "step": step, **values})
            seq += 1
        first = max(1, last - 3 - stretch % 4)
        if stretch % 2 == 0:
            attempt, seq = attempt + 1, 0
    return events


def live_losses(events: list[Event]) -> dict[int, float]:
    """What counts, found the slow way: a dictionary that forgets what it goes back before."""
    live: dict[int, float] = {}
    for event in events:
        live = {step: loss for step, loss in live.items() if step < event["step"]}
        live[event["step"]] = event["loss"]
    return live
