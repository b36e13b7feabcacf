"""Start the processes of one training run on this machine, and never leave one behind.

Each child leads a process group of its own: a Ctrl-C in the terminal reaches only this process, which passes
it on once. When this process dies, however it dies, a small shell kills those groups (a compiler that a child
has started is no child of ours); on Linux the kernel kills the children even before.
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

from cluster.errors import Interrupted, Preempted
from cluster.stop import SIGNALS, reason_of, stopped

GRACE_SECONDS = 10.0
"""How long the others may go on after one child has failed."""
TERMINATE_SECONDS = 5.0
"""How long they have after SIGTERM, before SIGKILL."""

_PR_SET_PDEATHSIG = 1
_STOP_CODES = (Preempted.exit_code, Interrupted.exit_code)
# Its input ends when this process does: the only one that holds the other end of the pipe.
_WATCH = 'read -r _; for group; do kill -s KILL -- "-$group"; done 2>/dev/null'

Child = subprocess.Popen[bytes]


def run_local(argv: list[str], processes: int, env: dict[str, str] | None) -> int:
    """Run `argv` in `processes` children with the rank variables of torchrun, and wait for all of them.

    `env` is added to this process's environment. stdout and stderr are shared; SIGINT and SIGTERM are passed
    on, to each child exactly once. SIGINT waits until the child calls `stop.end_at_once` or enters a
    `StopRequest`, so it never ends in a traceback. Returns 0 if every child did, else the exit code of the
    first that failed (128 + n for signal n): the others then get GRACE_SECONDS, then SIGTERM, then SIGKILL.
    Must be called in the main thread.

    Raises:
        Preempted, Interrupted: asked to stop, and the first child ended before it could say so itself.
        OSError: `argv` cannot be started.
    """
    shared = {
        "OMP_NUM_THREADS": str(max(1, _cpus() // processes)),
        **os.environ,
        **(env or {}),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    children: list[Child] = []
    ended: queue.Queue[int] = queue.Queue()
    with _passing_on_signals(children, processes) as (early, later):
        try:
            for rank in range(processes):
                children.append(_start(argv, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for number in early:
                _signal(children, number)
            for child in children:
                threading.Thread(target=lambda child=child: ended.put(child.wait()), daemon=True).start()
            with _watched(children):
                code = _wait(children, ended)
        finally:
            for child in children:
                _kill_group(child)
    asked = [*early, *later]
    if asked and (code < 0 or code in _STOP_CODES):
        if children[0].returncode not in _STOP_CODES:
            raise stopped(reason_of(asked[0]), "stopped before the first process could say so")
        return children[0].returncode
    return code if code >= 0 else 128 - code


def _wait(children: list[Child], ended: queue.Queue[int]) -> int:
    """Take the children's ends in the order in which they happen: 0, or the first other (-n: signal n)."""
    for left in range(len(children) - 1, -1, -1):
        code = ended.get()
        if code != 0:
            _wind_down(children, ended, left)
            return code
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
        argv, env=env, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_before_its_program()
    )


def _before_its_program() -> Callable[[], None]:
    """What a child does before it becomes its program: hold SIGINT back, and on Linux ask the kernel for
    SIGKILL when its parent is gone."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before we asked
                os._exit(128 + signal.SIGKILL)

    return prepare


@contextmanager
def _watched(children: list[Child]) -> Iterator[None]:
    """While the block runs, the death of this process is the end of the children's groups."""
    groups = [str(child.pid) for child in children]
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", _WATCH, "sh", *groups], stdin=subprocess.PIPE, process_group=0
    )
    try:
        yield
    finally:
        watcher.kill()
        watcher.communicate()


@contextmanager
def _passing_on_signals(children: list[Child], processes: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the signals that came before all children were there, which nobody has yet, and those after."""
    early: list[int] = []
    later: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if len(children) < processes:
            early.append(number)
        else:
            later.append(number)
            _signal(children, number)

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield early, later
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal(children: list[Child], number: int) -> None:
    """Signal every child that still runs; SIGKILL goes to its group, since it cannot end its own children."""
    for child in children:
        if child.poll() is None:
            if number == signal.SIGKILL:
                _kill_group(child)
            else:
                with suppress(ProcessLookupError):
                    child.send_signal(number)


def _kill_group(child: Child) -> None:
    """Of a child that has ended too: what it started may go on without it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def free_port() -> int:
    """Of the loopback interface; free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
