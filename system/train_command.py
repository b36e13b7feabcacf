"""`maskclip train` without a launcher: check what every rank needs once, so that a mistake is one line and
opens no attempt; start the ranks, wait for them, and say how it ended."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from cluster.errors import Hang, Interrupted, MaskClipError, Preempted
from cluster.local_launch import run_local
from cluster.manifest import verify
from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import load_dataset
from data_pipeline.loading.mixing import mix_digest
from system.checkpoints.checkpoint import committed_steps, open_checkpoint
from system.commands import HANDED_OVER, Result, train_config
from system.config import TrainConfig, to_dict
from system.report.history import last_words, own_attempt
from system.run_folder import check_run


def train_locally(args: argparse.Namespace, check_stop: Callable[[], None]) -> Result:
    """Train in processes of this machine. `check_stop` raises if this process was asked to stop.

    Raises:
        ConfigError, DataError, CheckpointIncompatible, StorageUnavailable: known before a rank was started.
    """
    config = train_config(args.recipe, args.knobs)
    parts = config.data.parts
    digests = [load_dataset(part.uri).digest for part in parts]
    dataset = mix_digest(digests, [part.weight for part in parts])
    run = open_store(config.run.uri, config.store)
    check_run(run, config, dataset)
    facts = {"run": config.run.uri, "dataset": dataset, "exit_code": 0, "steps": config.run.steps}
    next_command = f"next: maskclip evaluate {config.run.uri} data=..."
    finished = finished_step(run, config.run.steps)
    if finished is not None:
        facts |= {"last_checkpoint": finished, "attempt": None, "steps_done": finished}
        return Result(facts, f"trained to step {finished} before, nothing is left to do; {next_command}")
    check_stop()
    started = time.time()
    code, failure = run_ranks(config, args)
    facts |= {"exit_code": code, **outcome(run, started, code, failure)}
    if code == 0:
        return Result(facts, f"trained to step {config.run.steps}; {next_command}")
    if failure is not None:
        print(f"maskclip: {failure} (exit code {code})", file=sys.stderr, flush=True)
    text = f"training ended with exit code {code}; last committed checkpoint: {facts['last_checkpoint']}"
    return Result(facts, text, code)


def finished_step(run: ObjectStore, steps: int) -> int | None:
    """The newest checkpoint's step if it ends the run and its files are there; a damaged one is for the ranks
    to set aside."""
    newest = max(committed_steps(run), default=0)
    if newest < steps:
        return None
    try:
        problems = verify(*open_checkpoint(run, newest), deep=False)
    except MaskClipError:
        return None
    return None if problems else newest


def run_ranks(config: TrainConfig, args: argparse.Namespace) -> tuple[int, MaskClipError | None]:
    """The exit code, and what this process has to say because no rank did."""
    # -P: a folder named model/ or system/ in the working directory must not shadow the installed packages.
    argv = [sys.executable, "-P", "-m", "system.cli", "train", args.recipe, *args.knobs]
    handed_over = {HANDED_OVER: json.dumps(to_dict(config))}
    try:
        code = run_local(argv, config.run.processes, handed_over)
    except (Preempted, Interrupted) as error:
        return error.exit_code, type(error)("stopped; run the same command to go on")
    if code > 128 and code != Interrupted.exit_code:
        name = signal.Signals(code - 128).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        lost = Hang(f"a rank was killed by {name}{hint}; run the same command to go on")
        return lost.exit_code, lost
    if code == Hang.exit_code:  # every rank that lost another one ends so, and leaves the telling to us
        return code, Hang(
            "the ranks did not meet, lost each other, stood still or differ (see the lines above and "
            f"{config.run.uri}/hangs/); run the same command to go on"
        )
    return code, None


def outcome(run: ObjectStore, started: float, code: int, failure: MaskClipError | None) -> dict[str, Any]:
    """What the run folder says of the attempt that just ended, as far as the store answers."""
    found: dict[str, Any] = {"last_checkpoint": None, "attempt": None}
    try:
        found["last_checkpoint"] = max(committed_steps(run), default=None)
        found["attempt"] = own_attempt(run, started)
        words = last_words(run, found["attempt"]) if found["attempt"] else None
    except (MaskClipError, ValueError):
        words = None
    if words is not None:
        done = words.steps_done if words.steps_done is not None else words.resumed_step or 0
        found |= {"resumed_step": words.resumed_step, "steps_done": done, "loss": words.loss}
    if code == 0:
        return found
    if failure is not None:
        return found | {"error": type(failure).__name__, "message": str(failure)}
    reasons = [reason for ended_with, reason in words.ends if ended_with == code] if words else []
    error, _, message = (reasons or ["MaskClipError: see the lines of the ranks on stderr"])[0].partition(
        ": "
    )
    return found | {"error": error, "message": message}
