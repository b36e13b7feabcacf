"""How long does the page take over a log of a million events, and how much memory does its server need?

Writes a run of --events steps with 11 scalars in 20 attempts with rewinds, serves it with
`maskclip dashboard` in a process of its own, and opens it in Chromium. "Ready" is when all numbers, curves
and tables are drawn.

    python -m benchmarks.dashboard [--events 1000000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser

from tests.support.dashboard_server import READY, Server, browser, dashboard
from tests.support.replayed_run import Replay

ATTEMPTS, REWIND, SEGMENT, LOOKS = 20, 137, 20_000, 7


def write_run(folder: Path, events: int) -> None:
    log, at = Replay(folder), 0
    for attempt in range(1, ATTEMPTS + 1):
        first = max(1, at - REWIND)
        log.start(attempt, resumed=first - 1 or None)
        for at in range(first, first + events // ATTEMPTS, SEGMENT):
            last = min(at + SEGMENT, first + events // ATTEMPTS) - 1
            log.steps(attempt, at, last)
            log.commit(attempt, last)
            log.flush()
            at = last


def memory(pid: int) -> dict[str, float]:
    """VmRSS and VmHWM in MiB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[0] in ("VmRSS:", "VmHWM:")}


def read_whole(server: Server) -> float:
    """Seconds until the log is read for the first time."""
    started = time.perf_counter()
    while json.loads(server.get("/api/overview")[2])["read"] < 1:
        time.sleep(1.0)
    return time.perf_counter() - started


def ready(found: Browser, address: str) -> float:
    page = found.new_context(viewport={"width": 1600, "height": 1000}).new_page()
    started = time.perf_counter()
    page.goto(address)
    page.wait_for_selector(READY, state="attached", timeout=60_000)
    seconds = time.perf_counter() - started
    page.context.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        write_run(run, args.events)
        size = sum(path.stat().st_size for path in run.rglob("*.jsonl"))
        with dashboard(run) as server, browser() as found:
            before = memory(server.pid)
            first_look = ready(found, server.address)  # while the log is being read
            reading = read_whole(server)
            looks = [ready(found, server.address) for _ in range(LOOKS)]
            after = memory(server.pid)
            story = json.loads(server.get("/api/overview")[2])
    result = {
        "events": story["events"],
        "log_mib": size / 2**20,
        "first_look_seconds": first_look,
        "reading_seconds": first_look + reading,
        "ready_median_seconds": statistics.median(looks),
        "ready_worst_seconds": max(looks),
        "server_mib_before": before["VmRSS"],
        "server_mib_after": after["VmRSS"],
        "server_mib_peak": after["VmHWM"],
    }
    for key, value in result.items():
        print(f"{key:24} {value:,.2f}" if isinstance(value, float) else f"{key:24} {value:,}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
