"""`maskclip demo`: the main job on the emoji sample, with a kill -9 of the trainer midway, by the commands
that a user runs.

Every step is a `maskclip` process of its own; this file starts them, kills one, and checks what came out.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.errors import ConfigError, MaskClipError
from cluster.events import read_events
from cluster.store import open_store
from system.config import load_train_recipe

ROOT = Path(__file__).resolve().parent.parent
KILL_AT = 0.55
"""Share of the run's steps after which the trainer is killed."""
TIMES_CHANCE = 10.0
"""Image-to-text R@5 on the unseen style must be at least this many times chance."""


def run_demo(folder: Path) -> dict[str, Any]:
    """Run everything under `folder`; data sets that are there are used again, the run is always a new one.

    Raises:
        ConfigError: this is no clone of the repository, so there is no sample.
        MaskClipError: a step failed, or retrieval is not better than chance by the stated factor.
    """
    if not (ROOT / "examples/emoji/train").is_dir():
        raise ConfigError(f"{ROOT}: no examples/emoji here; run the demo from a clone of the repository")
    folder = folder.resolve()
    started, run = time.monotonic(), _free_name(folder, "run")
    train_data, eval_data = folder / "data-train", folder / "data-eval"
    for name, output in (("train", train_data), ("eval", eval_data)):
        source = f"source.uri={ROOT / 'examples/emoji' / name}"
        _maskclip("preprocess", f"configs/emoji_{name}_data.yaml", source, f"output={output}")

    train = ("train", "configs/emoji.yaml", f"run.uri={run}", f"data.uri={train_data}")
    steps = load_train_recipe(str(ROOT / train[1]), [*train[2:]]).run.steps
    killed_at = _train_and_kill(train, run, round(KILL_AT * steps))
    _maskclip(*train)

    scores = _maskclip("evaluate", str(run), f"data={eval_data}")
    export = folder / f"export-{run.name}"
    _maskclip("export", str(run), f"output={export}")
    report = folder / "report.html"
    _maskclip("report", str(run), f"output={report}")
    return _verdict(scores, run, report, export, killed_at, time.monotonic() - started)


def _free_name(folder: Path, prefix: str) -> Path:
    number = 1
    while (folder / f"{prefix}-{number}").exists():
        number += 1
    return folder / f"{prefix}-{number}"


def _say(message: str) -> None:
    Console(stderr=True, highlight=False).print(message, style="bold", markup=False)


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "system.cli", *words]


def _maskclip(*words: str) -> dict[str, Any]:
    """One command with --json; its progress goes to our stderr, its result is returned."""
    _say(f"\n$ maskclip {' '.join(words)}")
    done = subprocess.run([*_command(words), "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise MaskClipError(f"demo: `maskclip {words[0]}` ended with exit code {done.returncode}; see above")
    return json.loads(done.stdout)


def _train_and_kill(words: Sequence[str], run: Path, step: int) -> int:
    """Train until `step` was logged, then SIGKILL the trainer; returns the last step that the log knows."""
    _say(f"\n$ maskclip {' '.join(words)}    # gets kill -9 at about step {step}")
    trainer = subprocess.Popen(_command(words), cwd=ROOT, process_group=0)
    try:
        while _last_step(run) < step:
            if trainer.poll() is not None:
                raise MaskClipError(
                    f"demo: `maskclip train` ended with exit code {trainer.returncode} before the kill"
                )
            time.sleep(0.5)
    finally:
        if trainer.poll() is None:
            os.killpg(trainer.pid, signal.SIGKILL)
            trainer.wait()
    last = _last_step(run)
    _say(f"killed the trainer with SIGKILL after step {last}")
    return last


def _last_step(run: Path) -> int:
    if not run.is_dir():
        return 0
    steps = [event["step"] for event in read_events(open_store(str(run))) if event["kind"] == "scalar"]
    return max(steps, default=0)


def _verdict(
    scores: dict[str, Any], run: Path, report: Path, export: Path, killed_at: int, seconds: float
) -> dict[str, Any]:
    retrieval = scores["retrieval"]["image_to_text"]
    found, chance = retrieval["r5"], scores["retrieval"]["chance"]["image_to_text"]["r5"]
    events = read_events(open_store(str(run)))
    resumed = [e["resumed_step"] for e in events if e["name"] == "attempt_started" and e["resumed_step"]]
    if not resumed:
        raise MaskClipError(
            f"demo: {run}: the second attempt did not resume from a checkpoint; see its events"
        )
    if found < TIMES_CHANCE * chance:
        raise MaskClipError(
            f"demo: image-to-text R@5 on the unseen style is {found:.1%}, "
            f"less than {TIMES_CHANCE:g} times chance ({chance:.1%})"
        )
    return {
        "killed_after_step": killed_at,
        "resumed_from_step": resumed[-1],
        "image_to_text_r5": found,
        "chance_r5": chance,
        "times_chance": found / chance,
        "seconds": round(seconds, 1),
        "run": str(run),
        "export": str(export),
        "report": str(report),
    }
