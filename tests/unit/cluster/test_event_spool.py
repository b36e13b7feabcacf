"""With a spool no event is lost while the store is away, and none is written twice."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.errors import StorageUnavailable
from cluster.event_spool import Spool, SpoolFull
from cluster.events import EventLog, read_events
from cluster.store import open_store
from cluster.store_base import StoreConfig
from cluster.store_local import LocalStore
from tests.support.paths import ROOT


class Away(LocalStore):
    """A store behind a network that comes and goes, or never answers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), StoreConfig(attempts=1))
        self.there = threading.Event()
        self.asked = threading.Event()
        self.hangs = False

    def put(self, key: str, data: bytes) -> None:
        self.asked.set()
        if self.hangs:
            self.there.wait(30)
        if not self.there.is_set():
            raise StorageUnavailable("no route to the store")
        super().put(key, data)


def steps(folder: Path) -> list[int]:
    return [event["step"] for event in read_events(open_store(str(folder))) if event["name"] == "step"]


@pytest.mark.parametrize("hangs", [False, True])
def test_nothing_is_lost_while_the_store_is_away(tmp_path: Path, hangs: bool):
    store = Away(tmp_path / "run")
    store.hangs = hangs
    spool = Spool(tmp_path / "spool", store, 0, 10**6)
    log = EventLog(spool, 1, 0, flush_seconds=0.01)
    for step in range(200):
        log.scalar(step)
        if step % 20 == 0:
            assert log.flush()  # on the disk, whatever the store does
    assert store.asked.wait(10)
    assert steps(tmp_path / "run") == []
    store.there.set()
    log.close()
    spool.close()
    assert steps(tmp_path / "run") == list(range(200))
    assert log.dropped == 0
    assert spool.waiting() == []


def test_what_a_killed_process_left_is_sent_by_the_next(tmp_path: Path):
    code = """
import os, sys
from pathlib import Path
from cluster.event_spool import Spool
from cluster.events import EventLog
from tests.unit.cluster.test_event_spool import Away
log = EventLog(Spool(Path(sys.argv[1], "spool"), Away(Path(sys.argv[1], "run")), 0, 10**6), 1, 0, 0.01)
for step in range(30):
    log.scalar(step)
assert log.flush()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT).returncode == -9
    assert steps(tmp_path / "run") == []
    Spool(tmp_path / "spool", open_store(str(tmp_path / "run")), 0, 10**6).close()
    assert steps(tmp_path / "run") == list(range(30))


def test_a_full_spool_keeps_events_in_memory(tmp_path: Path):
    store = Away(tmp_path / "run")
    spool = Spool(tmp_path / "spool", store, 0, 2_000)
    with pytest.raises(SpoolFull):
        spool.put("events/segment-000000.jsonl", b"x" * 2_001)
    log = EventLog(spool, 1, 0, flush_seconds=60)
    for step in range(100):
        log.scalar(step)
    assert not log.flush(0.05)
    assert spool.waiting() == []
    store.there.set()
    log.close()
    spool.close()
    assert log.dropped == 100  # one segment that fits in no spool: lost, and counted


def test_a_full_disk_stops_nobody(tmp_path: Path):
    """A process that may write no file beyond 20 kB, as on a disk that is full then."""
    code = """
import resource, signal, sys
from pathlib import Path
from cluster.events import EventLog
from cluster.store import open_store
from cluster.store_base import StoreConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
log = EventLog(open_store(sys.argv[1], StoreConfig(attempts=1)), 1, 0, 0.01, capacity=500)
for step in range(3000):
    log.scalar(step, text="x" * 100)
    if step == 0:
        assert log.flush()
log.close()
print(log.dropped)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    written = steps(tmp_path)
    assert int(done.stdout) + len(written) == 3000
    assert written[0] == 0
    assert int(done.stdout) > 0
    assert done.stderr.count("the store fails") == 1
