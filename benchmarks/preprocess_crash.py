"""Is a preprocess that was killed at random moments the same, byte for byte, as one that nobody touched?

    python -m benchmarks.preprocess_crash [--kills 100] [--seed 0] [--json FILE]

A small raw input of tars, with rows that are broken and rows that are there twice, goes through the whole
pipeline with a global shuffle. Driver processes, and the Ray workers that do their tasks, get SIGKILL at
random moments; a driver that died is started again, as a supervisor would, until the data set is committed.
Then the SHA-256 of every file in the folder must equal those of the undisturbed run and the audit must find
each row exactly once; and it begins anew in an empty folder, until all kills are spent. The local Ray cluster
lives on, as a cluster does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.support.crash_rig import crash


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="maskclip-") as folder:
        outcome, files = crash(args.kills, args.seed, Path(folder))
    for name, value in asdict(outcome).items():
        print(f"{name:15} {value}")
    print(f"{'files per set':15} {files}")
    if args.json:
        args.json.write_text(
            json.dumps(asdict(outcome) | {"seed": args.seed, "files": files}, indent=1) + "\n"
        )
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
