"""Is a run that was killed, wherever and whenever, to the bit the run that nobody killed?

    python -m benchmarks.kill_sweep [--kills 200] [--points POINT ...] [--stage 1] [--store s3] [--json FILE]

Two ranks of the real trainer (tiny model, ZeRO, a save every 2 of 10 steps) get SIGKILL, one of them or all,
at every instrumented point of a step, a save, a prune and a restore, and then at random moments; each time
the job is started again as a supervisor would. After every attempt each committed checkpoint must verify and
be, byte for byte, that of the undisturbed run; the attempt must have gone on from the newest one; and in the
end every loss of every attempt must be equal. `make sweep` is this with the settings above; `--store s3`
starts a server of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common import machine
from tests.support.faulty_rank import POINTS
from tests.support.kill_sweep import Outcome, Sweep
from tests.support.s3_server import S3Server


@contextmanager
def places(store: str, folder: Path) -> Iterator[Callable[[], str]]:
    """Addresses for runs."""
    if store == "local":
        yield lambda: str(folder / secrets.token_hex(8))
        return
    server = S3Server(folder / "server")
    server.start()
    os.environ |= server.env
    bucket = server.make_bucket("runs")
    try:
        yield lambda: f"{bucket}/{secrets.token_hex(8)}"
    finally:
        server.kill()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="at random moments")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no new run after so many")
    parser.add_argument("--points", nargs="*", default=tuple(POINTS), help="all if not given")
    parser.add_argument("--stage", type=int, default=1, choices=range(4), help="of ZeRO")
    parser.add_argument("--store", choices=("local", "s3"), default="local", help="where the runs are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(width=120)
    with (
        tempfile.TemporaryDirectory(prefix="maskclip-") as folder,
        places(args.store, Path(folder)) as place,
        console.status("the undisturbed run") as line,
    ):

        def progressed(now: Outcome) -> None:
            line.update(f"{now.kills} kills, {now.runs} runs, {len(now.wrong)} wrong, {now.seconds:.0f} s")

        sweep = Sweep(Path(folder), place, args.stage, args.seed, progressed)
        sweep.at_points(args.points)
        sweep.at_moments(args.kills, 60 * args.minutes)
    outcome = sweep.outcome
    table = Table("", "", title="kill sweep", show_header=False)
    for name, value in asdict(outcome).items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), f"{shown:.0f}" if isinstance(shown, float) else str(shown))
    console.print(table)
    if args.json:
        about = machine(["torch", "deepspeed"]) | {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps(asdict(outcome) | {"about": about}, indent=1) + "\n")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
