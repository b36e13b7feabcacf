"""The newest evaluation of a run, with the pictures that it found."""

import json
from typing import Any

from cluster.errors import ObjectNotFound
from cluster.store import ObjectStore
from system.evaluation.view import scores

_NEWEST = 12


def last_evaluation(run: ObjectStore) -> dict[str, Any] | None:
    """Scores and, of the newest result that has any, examples with pictures; None without evaluation."""
    keys = sorted(info.key for info in run.list("evaluations/") if info.key.endswith(".json"))
    results = [result for key in keys[-_NEWEST:] if (result := _read(run, key)) is not None]
    if not results:
        return None
    newest = max(results, key=lambda result: (result["step"], result["time"]))
    pictured = [result for result in results if result.get("examples")]
    shown = max(pictured, key=lambda result: (result["step"], result["time"]), default=None)
    return {
        "step": newest["step"],
        "tower": newest["tower"],
        "data": newest["data"],
        "scores": [
            {
                "task": score.task,
                "measure": score.label,
                "result": score.shown,
                "interval": score.shown_interval,
                "chance": score.shown_chance,
            }
            for score in scores(newest)
        ],
        "pictures_of_step": shown and shown["step"],
        "examples": shown and shown["examples"],
        "pictures": shown and shown["pictures"],
    }


def _read(run: ObjectStore, key: str) -> dict[str, Any] | None:
    try:
        return json.loads(run.get(key))
    except (ObjectNotFound, ValueError):  # deleted, or torn by a copy
        return None
