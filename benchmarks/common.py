"""The frame of all benchmarks: sides that take turns, medians and ratios, peers in their own environments.

A benchmark names two sides, ours and a peer's, as `Snippet`s: source code that defines `run() -> int`, which
returns the number of items it did, and may use the dictionary ARGS and leave remarks in the dictionary NOTE.
Each side lives in a process of its own, a peer in a virtual environment of its own under build/bench. What is
reported is CPU time per item (user and system, of the process and its finished children), because the machine
may be shared; wall time stands beside it. Images come from `benchmarks/images.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"
_HARNESS = """
import json, os, resource, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the code under test prints is no answer
def used():
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)
task = json.loads(sys.stdin.readline())
scope = {"__name__": "snippet", "ARGS": task["args"]}
exec(compile(task["source"], task["name"], "exec"), scope)
for _ in sys.stdin:
    cpu, wall = used(), time.perf_counter()
    items = scope["run"]()
    cpu, wall = used() - cpu, time.perf_counter() - wall
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    note = scope.get("NOTE", {})
    print(json.dumps(dict(items=items, cpu=cpu, wall=wall, rss_mb=rss, note=note)), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Measure:
    """One turn of a side: seconds for `items` items, the process's peak memory so far, the snippet's NOTE."""

    items: int
    cpu: float
    wall: float
    rss_mb: float
    note: dict[str, Any] = field(default_factory=dict)


class Snippet:
    """A side: `source` run in its own process of `python`; each call is one turn. Close it when done."""

    def __init__(self, name: str, source: str, args: dict[str, Any], python: Path | None = None) -> None:
        self.name = name
        environment = os.environ | dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1"
        )
        environment["PYTHONPATH"] = str(ROOT) if python is None else ""
        command = [str(python or sys.executable), "-c", _HARNESS]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._tell(json.dumps({"name": name, "source": source, "args": args}))

    def __call__(self) -> Measure:
        self._tell("go")
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}: see its message above")
        return Measure(**json.loads(answer))

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True)
class Comparison:
    """The turns of one case. `ratio` is how many times more CPU time per item the peer takes."""

    case: str
    ours: list[Measure]
    theirs: list[Measure]
    limit: list[Measure]
    goal: float | None = None

    def ratio(self, clock: str = "cpu", over: str = "ours") -> float:
        return statistics.median(
            cost(b, clock) / cost(a, clock) for a, b in zip(getattr(self, over), self.theirs, strict=True)
        )


def cost(turn: Measure, clock: str = "cpu") -> float:
    """Seconds per item."""
    return getattr(turn, clock) / turn.items


Side = Callable[[], Measure]


def alternate(
    case: str,
    ours: Side,
    theirs: Side,
    limit: Side | None = None,
    *,
    rounds: int = 5,
    goal: float | None = None,
) -> Comparison:
    """Let the sides take turns, `rounds` times after one that is not counted; `limit` is the part of the work
    that nobody can leave out, timed alone: the physical limit."""
    if rounds < 5:
        raise ValueError(f"rounds is {rounds}: a median needs 5 or more")
    sides = [side for side in (ours, theirs, limit) if side is not None]
    turns = [[side() for side in sides] for _ in range(rounds + 1)][1:]
    columns = [list(column) for column in zip(*turns, strict=True)]
    return Comparison(case, columns[0], columns[1], columns[2] if limit else [], goal)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="turns per side that count, 5 or more")
    parser.add_argument("--json", type=Path, help="write all turns and the machine to this file as well")
    return parser


def report(
    title: str, results: Sequence[Comparison], packages: Sequence[str], json_path: Path | None, **extra: Any
) -> None:
    """Print medians (quartiles in brackets, ms of CPU time per item), ratios, limits; write JSON if asked."""
    table = Table("case", "peer ms", "ours ms", "ratio cpu", "wall", "limit", "goal", title=title)
    for result in results:
        limit = _times(result.ratio(over="limit")) if result.limit else ""
        goal = "" if result.goal is None else f"{result.goal:g}x"
        if result.goal is not None:
            goal += " met" if result.ratio() >= result.goal else " MISSED"
        ratios = _times(result.ratio()), _times(result.ratio("wall"))
        table.add_row(result.case, _spread(result.theirs), _spread(result.ours), *ratios, limit, goal)
    console = Console(width=120)
    console.print(table)
    about = machine(packages) | extra
    console.print("; ".join(f"{k} {v}" for k, v in about.items() if isinstance(v, str)))
    if json_path is not None:
        cases = [asdict(r) | {"ratio": r.ratio(), "ratio_wall": r.ratio("wall")} for r in results]
        json_path.write_text(json.dumps({"title": title, "about": about, "cases": cases}, indent=1) + "\n")


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:,.0f}x"


def _spread(turns: list[Measure]) -> str:
    low, middle, high = statistics.quantiles([1e3 * cost(turn) for turn in turns], n=4)
    return f"{middle:.3g} [{low:.3g}-{high:.3g}]"


def machine(packages: Sequence[str]) -> dict[str, str]:
    """What a figure depends on: processor, load, Python and the versions of our side's packages."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    return {
        "cpu": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    } | {package: version(package) for package in packages}


def peer_python(name: str, requirements: Sequence[str], alone: Sequence[str] = ()) -> Path:
    """Python of the peer's own virtual environment under build/bench, made by pip on the first call; `alone`
    are packages installed without what they depend on."""
    folder = BUILD / name
    python, mark = folder / "bin" / "python", folder / "ready"
    wanted = "\n".join([*requirements, *alone])
    if not mark.exists() or mark.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        for command in ([*pip, *requirements], [*pip, "--no-deps", *alone] if alone else None):
            if command is not None:
                subprocess.run(command, check=True)
        mark.write_text(wanted)
    return python
