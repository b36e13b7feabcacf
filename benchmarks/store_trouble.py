"""Does training feel it when its store is in trouble, and does a save succeed when the store is back?

    python -m benchmarks.store_trouble [--trouble-seconds 30] [--json FILE]

Two ranks of the real trainer (tiny model) save every 10 steps beside the training. In the middle of the run
the trouble begins, and ends after so many seconds; a minute of an operator's time is a second here, and so
are the deadlines: a save has failed after 10 s, an attempt of the store after 5 s. The cases: every request
gets 503; the uploads of one rank hang; the credentials have expired; the disk is full (a tmpfs, which needs
root). The step time in the trouble stands beside that of the same run before and after it. Goal: within 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import machine
from cluster.events import read_events
from cluster.store import open_store
from system.checkpoints.checkpoint import committed_steps
from system.checkpoints.commands import check
from tests.support import save_rig
from tests.support.s3_server import S3Server
from tests.support.troubled_proxy import EXPIRED, UNAVAILABLE, TroubledProxy

_DISK_BYTES = 96 << 20
DEADLINE_SECONDS = 10.0
SETTINGS = {
    "every_steps": 10,
    "keep_last": 2,
    "pause": 0.04,
    "patience": 600,
    "deadline_seconds": DEADLINE_SECONDS,
    "store": {"deadline_seconds": 5, "attempts": 3},
}


@dataclass(frozen=True)
class Case:
    """A place for a run, what brings the trouble, and what ends it."""

    run: str
    begin: Callable[[], object]
    end: Callable[[], object]


@contextmanager
def full_disk(folder: Path) -> Iterator[Case]:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(disk)], check=True)
    filler = disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as out:
            try:
                while out.write(bytes(1 << 16)):
                    pass
            except OSError:
                return

    try:
        yield Case(str(disk / "run"), fill, filler.unlink)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        shutil.rmtree(disk)


def watch(case: Case, steps: int, calm: float, trouble: float) -> dict[str, Any]:
    """One run, with the trouble in its middle."""
    command = [sys.executable, save_rig.__file__, case.run, json.dumps({**SETTINGS, "steps": steps}), "whole"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = open_store(case.run)
    while not committed_steps(run):
        if process.poll() is not None:
            raise RuntimeError(process.communicate()[1][-3000:])
        time.sleep(0.2)
    time.sleep(calm)
    began = time.time()
    case.begin()
    time.sleep(trouble)
    case.end()
    ended = time.time()
    out, errors = process.communicate()
    answers = [json.loads(line) for line in out.splitlines() if line.startswith('{"codes"')]
    if not answers:
        raise RuntimeError(errors[-3000:])
    events = read_events(run)
    scalars = [e for e in events if e["kind"] == "scalar" and e["step"] > 20]
    within = [e["step_seconds"] for e in scalars if began + 1 < e["t"] < ended]
    outside = [e["step_seconds"] for e in scalars if not began - 1 < e["t"] < ended + 1]
    alarms = [e for e in events if e["name"] == "checkpoint_failed"]
    back = [e for e in events if e["name"] == "checkpoint_committed" and e["t"] > ended]
    last = committed_steps(run)[-1]
    return {
        "codes": answers[0]["codes"],
        "steps_within": len(within),
        "steps_outside": len(outside),
        "step_within": statistics.median(within),
        "step_outside": statistics.median(outside),
        "alarms": len({e["step"] for e in alarms}),
        "first_alarm_after": min((e["t"] for e in alarms), default=float("nan")) - began,
        "longest_failed_save": max((e["seconds"] for e in alarms), default=float("nan")),
        "first_save_after": min((e["t"] for e in back), default=float("nan")) - ended,
        "last_step_saved": last == steps and not check(run, last),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trouble-seconds", type=float, default=30.0)
    parser.add_argument("--calm-seconds", type=float, default=12.0, help="before and, about, after")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console, found = Console(width=120), {}
    with tempfile.TemporaryDirectory(prefix="maskclip-") as name, console.status("") as line:
        folder = Path(name)
        server = S3Server(folder / "server")
        server.start()
        proxy = TroubledProxy(server.port)
        os.environ |= server.env | {"AWS_ENDPOINT_URL": proxy.endpoint}
        bucket = server.make_bucket("runs")
        troubles = {
            "503": lambda: proxy.fail(UNAVAILABLE),
            "one rank's upload hangs": lambda: proxy.hang("rank-00001.attempt"),
            "credentials expired": lambda: proxy.fail(EXPIRED),
        }
        try:
            for trouble, begin in troubles.items():
                line.update(trouble)
                case = Case(f"{bucket}/{secrets.token_hex(4)}", begin, proxy.mend)
                found[trouble] = watch(case, args.steps, args.calm_seconds, args.trouble_seconds)
                console.print(trouble, found[trouble])
            line.update("disk full")
            with full_disk(folder) as case:
                found["disk full"] = watch(case, args.steps, args.calm_seconds, args.trouble_seconds)
                console.print("disk full", found["disk full"])
        finally:
            proxy.close()
            server.kill()
    table = Table(
        "trouble", "step ms", "in it", "change", "failed saves", "first alarm s", "longest s", "back after s"
    )
    for trouble, facts in found.items():
        table.add_row(
            trouble,
            f"{1e3 * facts['step_outside']:.1f} ({facts['steps_outside']})",
            f"{1e3 * facts['step_within']:.1f} ({facts['steps_within']})",
            f"{facts['step_within'] / facts['step_outside'] - 1:+.1%}",
            str(facts["alarms"]),
            f"{facts['first_alarm_after']:.1f}",
            f"{facts['longest_failed_save']:.1f}",
            f"{facts['first_save_after']:.1f}",
        )
    console.print(table)
    about = machine(["torch", "deepspeed"])
    console.print("; ".join(f"{key} {value}" for key, value in about.items()))
    if args.json:
        args.json.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")
    good = all(not any(facts["codes"]) and facts["last_step_saved"] for facts in found.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
