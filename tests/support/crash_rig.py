"""Kills drivers and Ray workers of a preprocess at random moments, and compares what comes out in the end."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

from cluster.errors import exit_code_of
from cluster.ray_tasks import ray_session
from data_pipeline.image.transforms import TransformConfig
from data_pipeline.ingest.sources import SourceConfig
from data_pipeline.job.dedup import DuplicateConfig
from data_pipeline.job.preprocess import PreprocessConfig, run_preprocess
from data_pipeline.job.selection import ShardConfig
from data_pipeline.upkeep.audit import audit_dataset
from tests.support.raw_input import members, write_tar

CHUNKS, ROWS = 24, 6
_WORKER_SHARE = 0.5
_PATIENCE_SECONDS = 120.0


@dataclass
class Outcome:
    """What became of all the kills."""

    kills: int = 0
    killed: dict[str, int] = field(default_factory=dict)
    """Kills by "<who> in <stage>"."""
    commits: int = 0
    """Data sets that were finished and compared."""
    gave_up: int = 0
    """Drivers that ended with an error by themselves and were started again."""
    wrong_files: list[str] = field(default_factory=list)
    """Files that are missing, too many, or have another SHA-256."""
    audit_problems: list[str] = field(default_factory=list)
    """Lost and duplicated rows among them."""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not self.wrong_files and not self.audit_problems


def make_input(folder: Path) -> PreprocessConfig:
    """Raw tars under `folder`, and the recipe for them; its output is not set to a place of use."""
    for tar in range(CHUNKS):
        files = [file for i in range(ROWS) for file in members(f"{tar:03d}{i:03d}", tar * ROWS + i, 48, 32)]
        files += members(f"{tar:03d}again", (tar * 7) % (CHUNKS * ROWS), 48, 32)  # another tar has this image
        files += [("broken.jpg", b"no image"), ("broken.txt", b"broken")]
        write_tar(folder / f"{tar:05d}.tar", files)
    return PreprocessConfig(
        source=SourceConfig(uri=str(folder)),
        output=str(folder.parent / "unused"),
        transform=TransformConfig(short_side=24, fingerprints=True),
        duplicates=DuplicateConfig(bytes=True, near_radius=2),
        shards=ShardConfig(samples_per_shard=12, shuffle="global"),
        retries=50,
    )


def drive(config: PreprocessConfig, events: Connection) -> None:
    """A driver: runs the job and tells of its progress until it is done or killed."""

    def progress(state: dict[str, Any]) -> None:
        events.send(state["stage"])

    try:
        run_preprocess(config, progress)
    except BaseException as error:
        print(f"driver: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(exit_code_of(error))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, hidden and temporary ones included."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Rig:
    """Starts drivers on the Ray cluster of this process and kills them and its workers."""

    def __init__(self, config: PreprocessConfig, folder: Path, seed: int) -> None:
        self.config, self.folder = config, folder
        self.random = random.Random(seed)
        self.outcome = Outcome()
        # Forked from a process that has imported everything but holds no thread and no Ray.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self.reference, self._lengths = self._undisturbed()

    def _undisturbed(self) -> tuple[dict[str, str], dict[str, float]]:
        """The files of a run that nobody kills, and how many seconds each of its stages took."""
        for name in ("warm", "reference"):
            process, events = self._start(self.folder / name)
            starts: dict[str, float] = {}
            with suppress(EOFError):
                while True:
                    starts.setdefault(events.recv(), time.monotonic())
            process.join()
            if process.exitcode:
                raise RuntimeError(f"the undisturbed driver ended with {process.exitcode}: see above")
        ends = [*list(starts.values())[1:], time.monotonic()]
        lengths = {stage: end - starts[stage] for stage, end in zip(starts, ends, strict=True)}
        first, second = digests(self.folder / "warm"), digests(self.folder / "reference")
        if first != second:
            raise RuntimeError("two undisturbed runs differ: the benchmark cannot say anything")
        return first, lengths

    def spend(self, kills: int) -> Outcome:
        """Kill until `kills` are spent, and finish the data set that is then under way."""
        start = time.monotonic()
        while self.outcome.kills < kills:
            output = self.folder / f"set-{self.outcome.commits}"
            while not self._attempt(output, kills):
                pass
            self._compare(output)
        self.outcome.seconds = time.monotonic() - start
        return self.outcome

    def _attempt(self, output: Path, kills: int) -> bool:
        """One driver, until it has committed (True), was killed or gave up.

        Each kill aims at a random moment of a random stage, so that the short ones get their share.
        """
        process, events = self._start(output)
        stages = list(self._lengths)
        stage, until = "", time.monotonic() + _PATIENCE_SECONDS
        while process.is_alive() and self.outcome.kills < kills and time.monotonic() < until:
            aim = self.random.choice(stages)
            with suppress(EOFError):
                while process.is_alive() and (not stage or stages.index(stage) < stages.index(aim)):
                    stage = events.recv()
            process.join(self.random.uniform(0, self._lengths[aim]))
            with suppress(EOFError):
                while events.poll():
                    stage = events.recv()
            if not process.is_alive():
                break
            if self.random.random() >= _WORKER_SHARE:
                process.kill()
                self._note("driver", stage)
                break
            if (victim := self._worker()) is not None:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    self._note("worker", stage)
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            raise RuntimeError(f"a driver hangs in stage {stage}")
        if process.exitcode not in (0, -signal.SIGKILL):
            self.outcome.gave_up += 1
        return process.exitcode == 0

    def _start(self, output: Path) -> tuple[Any, Connection]:
        config = replace(self.config, output=str(output))
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._context.Process(target=drive, args=(config, sending))
        process.start()
        sending.close()
        return process, receiving

    def _note(self, who: str, stage: str) -> None:
        self.outcome.kills += 1
        where = f"{who} in {stage}"
        self.outcome.killed[where] = self.outcome.killed.get(where, 0) + 1

    def _worker(self) -> int | None:
        """A worker process of the cluster, one that is at work if there is any."""
        workers = ray_workers()
        busy = [worker.pid for worker in workers if "IDLE" not in worker.title]
        pids = sorted(busy or (worker.pid for worker in workers))
        return self.random.choice(pids) if pids else None

    def _compare(self, output: Path) -> None:
        self.outcome.commits += 1
        found = digests(output)
        names = found.keys() | self.reference.keys()
        wrong = [name for name in sorted(names) if found.get(name) != self.reference.get(name)]
        self.outcome.wrong_files += [f"{output.name}/{name}" for name in wrong]
        self.outcome.audit_problems += audit_dataset(str(output)).problems
        verdict = "equal" if self.outcome.good else "DIFFERENT"
        print(f"{output.name}: {verdict}, {self.outcome.kills} kills so far", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class ProcessInfo:
    """A process as /proc shows it."""

    pid: int
    parent: int
    title: str
    ticks: int
    """CPU time, user and system."""

    def ancestors(self, table: dict[int, ProcessInfo]) -> Iterator[int]:
        """Pids of its parent, the parent's parent, and so on."""
        process: ProcessInfo | None = self
        while process is not None:
            yield process.parent
            process = table.get(process.parent)


def process_table() -> dict[int, ProcessInfo]:
    """All processes by pid."""
    table: dict[int, ProcessInfo] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            pid = int(folder.name)
            table[pid] = ProcessInfo(pid, int(fields[1]), title, int(fields[11]) + int(fields[12]))
    return table


def ray_workers() -> list[ProcessInfo]:
    """Every Ray worker process of the cluster that this process started."""
    table = process_table()
    named = (process for process in table.values() if process.title.startswith("ray::"))
    workers = [process for process in named if not process.title.endswith("Agent")]  # those are the node's
    return [process for process in workers if os.getpid() in process.ancestors(table)]


def crash(kills: int, seed: int, folder: Path) -> tuple[Outcome, int]:
    """Spend `kills` in `folder`; the outcome, and the number of files that each data set has."""
    # The drivers join this cluster by it; nobody after them may find it set.
    with ray_session(2), patch.dict(os.environ, RAY_ADDRESS=ray.get_runtime_context().gcs_address):
        rig = Rig(make_input(folder / "raw"), folder, seed)
        return rig.spend(kills), len(rig.reference)
