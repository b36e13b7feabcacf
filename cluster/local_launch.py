"""Start the processes of one training run on this machine, and never leave one behind.

Each child leads a process group of its own: a Ctrl-C in the terminal reaches only this process, which passes
it on once. On Linux the kernel kills the children when this process dies, however it dies.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE_SECONDS = 10.0
"""How long the others may go on after one child has failed."""
TERMINATE_SECONDS = 5.0
"""How long they have after SIGTERM, before SIGKILL."""

_PR_SET_PDEATHSIG = 1

Child = subprocess.Popen[bytes]


def run_local(argv: list[str], processes: int, env: dict[str, str] | None) -> int:
    """Run `argv` in `processes` children with the rank variables of torchrun, and wait for all of them.

    `env` is added to this process's environment. stdout and stderr are shared; SIGINT and SIGTERM are passed
    on. Returns 0 if every child did, else the exit code of the first that failed (128 + n for signal n): the
    others then get GRACE_SECONDS, then SIGTERM, then SIGKILL. Must be called in the main thread; OSError if
    `argv` cannot be started.
    """
    shared = {
        "OMP_NUM_THREADS": str(max(1, _cpus() // processes)),
        **os.environ,
        **(env or {}),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    children: list[Child] = []
    ended: queue.Queue[int] = queue.Queue()
    with _passing_on_signals(children):
        try:
            for rank in range(processes):
                children.append(_start(argv, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for child in children:
                threading.Thread(target=lambda child=child: ended.put(child.wait()), daemon=True).start()
            return _wait(children, ended)
        finally:
            _signal(children, signal.SIGKILL)


def _wait(children: list[Child], ended: queue.Queue[int]) -> int:
    """Take the children's ends in the order in which they happen."""
    for left in range(len(children) - 1, -1, -1):
        code = ended.get()
        if code != 0:
            _wind_down(children, ended, left)
            return code if code > 0 else 128 - code
    return 0


def _wind_down(children: list[Child], ended: queue.Queue[int], left: int) -> None:
    """After the first failure: wait for the `left` other children, ever less patiently."""
    for patience, number in ((GRACE_SECONDS, signal.SIGTERM), (TERMINATE_SECONDS, signal.SIGKILL)):
        limit = time.monotonic() + patience
        with suppress(queue.Empty):
            while left:
                ended.get(timeout=max(0.0, limit - time.monotonic()))
                left -= 1
        if not left:
            return
        _signal(children, number)
    for _ in range(left):
        ended.get()


def _start(argv: list[str], env: dict[str, str]) -> Child:
    return subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_dying_with_parent()
    )


def _dying_with_parent() -> Callable[[], None] | None:
    """What a child does before it becomes its program: ask the kernel for SIGKILL when its parent is gone."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(128 + signal.SIGKILL)

    return ask


@contextmanager
def _passing_on_signals(children: list[Child]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        _signal(children, number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal(children: list[Child], number: int) -> None:
    """Signal every child that still runs; SIGKILL goes to its group, since it cannot end its own children."""
    for child in children:
        if child.poll() is None:
            with suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(child.pid, number)
                else:
                    child.send_signal(number)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
