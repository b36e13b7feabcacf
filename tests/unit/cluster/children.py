"""What the tests run in processes of their own. Needs no pytest, so spawned processes start fast."""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.synchronize import Barrier
from pathlib import Path

from cluster.events import EventLog
from cluster.store import ObjectStore, open_store

PROCESSES = 4
THREADS = 4
ROUNDS = 8


def race(store: ObjectStore) -> list[list[str]]:
    """For every round the names of the racers (4 processes of 4 threads) that won put_if_absent of the same
    key."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES * THREADS)
    wins = context.Queue()
    processes = [
        context.Process(target=_racers, args=(store, barrier, wins, number)) for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    claimed = [wins.get(timeout=120) for _ in range(PROCESSES * THREADS)]
    for process in processes:
        process.join()
    return [[name for name, rounds in claimed if number in rounds] for number in range(ROUNDS)]


def _racers(store: ObjectStore, barrier: Barrier, wins: multiprocessing.Queue, process: int) -> None:
    def racer(name: str) -> None:
        won = []
        for number in range(ROUNDS):
            barrier.wait(timeout=60)
            if store.put_if_absent(f"claim-{number}", name.encode()):
                won.append(number)
        wins.put((name, won))

    threads = [threading.Thread(target=racer, args=(f"{process}.{thread}",)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_object(store: ObjectStore, key: str, answers: multiprocessing.Queue) -> None:
    answers.put(store.get(key))


def write_for_ever(folder: str, size: int, source: str) -> None:
    """Write objects of `size` equal bytes by every kind of write, until killed."""
    store = open_store(folder)
    number = 0
    while True:
        number += 1
        data = bytes([number % 256]) * size
        store.put("put", data)
        store.put_if_absent(f"absent-{number}", data)
        Path(source).write_bytes(data)
        store.put_file("file", Path(source))


def log_for_ever(folder: str) -> None:
    """Log events until killed."""
    log = EventLog(open_store(folder), attempt=1, rank=0, flush_seconds=0.01)
    step = 0
    while True:
        log.scalar(step, loss=1.0 / (step + 1))
        step += 1
        threading.Event().wait(0.0005)
