"""The last proof of a restore: the first loss after it against the loss that the run had there before.

Most resumes repeat steps that an attempt has trained and lost. At the same topology their losses are equal to
the bit; at another one they differ by rounding only.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from cluster.store import ObjectStore

TOPOLOGY = ("processes", "zero_stage", "precision")
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference between two topologies."""


@dataclass(frozen=True)
class KnownLoss:
    """What an older attempt had at a step."""

    attempt: int
    loss: float
    topology: dict[str, Any]


def known_loss(run: ObjectStore, attempt: int, step: int) -> KnownLoss | None:
    """Of `step`, by the newest attempt before `attempt` that trained it; None if none did."""
    for number in range(attempt - 1, 0, -1):
        keys = [info.key for info in run.list(f"events/attempt-{number:04d}/rank-00000/")]
        topology: dict[str, Any] = {}
        loss = None
        for key in keys:
            for line in run.get(key).splitlines():
                if loss is None and b'"name":"step"' in line:
                    event = json.loads(line)
                    loss = float(event["loss"]) if event["step"] == step else None
                elif b'"name":"attempt_started"' in line:
                    event = json.loads(line)
                    topology = {name: event.get(name) for name in TOPOLOGY}
            if loss is not None:
                return KnownLoss(number, loss, topology)
    return None


def compare(known: KnownLoss, loss: float, topology: dict[str, Any]) -> dict[str, Any]:
    """The facts of a `first_loss` event; `off` when the two differ by more than they may."""
    same = known.topology == topology
    difference = abs(loss - known.loss) / max(abs(known.loss), 1e-12)
    allowed = 0.0 if same else TOLERANCE.get(str(topology.get("precision")), 0.0)
    return {
        "loss": loss,
        "known": known.loss,
        "known_attempt": known.attempt,
        "same_topology": same,
        "difference": difference,
        "off": not (math.isfinite(difference) and difference <= allowed),
    }
