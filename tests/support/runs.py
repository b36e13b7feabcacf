"""Start real training runs on a small committed data set, and read what they did."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster.errors import Hang
from cluster.events import read_events
from cluster.local_launch import run_local
from cluster.store import open_store
from tests.support import faulty_rank

RECIPE = """
command: train
run: {uri: none, steps: 12, processes: 2, seed: 5, event_seconds: 0.5}
data: {uri: none, global_batch: 24, streams: 4, window_shards: 2}
model: {preset: test}
optimizer: {lr: 1e-3, warmup_steps: 4}
teacher: {momentum_start: 0.9, momentum_end: 0.99}
engine: {zero_stage: 1, precision: fp32}
checkpoint: {every_steps: 4, background: false}
"""


def write_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def maskclip(
    *words: str | Path, cwd: Path | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    argv = [sys.executable, "-m", "system.cli", *map(str, words)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def train(recipe: Path, run: str | Path, data: str, *knobs: str, processes: int = 2) -> None:
    words = ("train", recipe, f"run.uri={run}", f"data.uri={data}", f"run.processes={processes}", *knobs)
    done = maskclip(*words)
    assert done.returncode == 0, done.stderr[-3000:]


def train_until_killed(
    recipe: Path,
    run: str | Path,
    data: str,
    *knobs: str,
    point: str,
    step: int,
    processes: int = 2,
    rank: int = 0,
) -> None:
    """A run in which one rank gets SIGKILL; the launcher ends the others."""
    words = [
        faulty_rank.__file__,
        point,
        str(step),
        str(rank),
        str(recipe),
        f"run.uri={run}",
        f"data.uri={data}",
    ]
    code = run_local([sys.executable, *words, *knobs], processes, None)
    # Which of the two deaths the launcher sees first is chance: that one, or the peer that lost it.
    assert code in (128 + 9, Hang.exit_code)


def live_steps(run: str | Path) -> dict[int, dict[str, Any]]:
    """The newest attempt's event of every step."""
    events = [event for event in read_events(open_store(str(run))) if event["kind"] == "scalar"]
    return {event["step"]: event for event in sorted(events, key=lambda event: event["attempt"])}


def instants(run: str | Path, name: str) -> list[dict[str, Any]]:
    """The first rank's events of that name."""
    return [e for e in read_events(open_store(str(run))) if e["name"] == name and e["rank"] == 0]
