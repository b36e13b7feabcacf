"""Temporary folders, and a clear word when their disk is full.

A process that is killed cannot tidy up, and a job that is preempted every day would fill the disk of its
node. So every folder is locked while its process lives (the kernel frees the lock with the process), and who
makes a folder removes those that nobody holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import StorageUnavailable

PREFIX = "maskclip-scratch-"
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A fresh folder where TMPDIR says, gone afterwards; if this process is killed, with the next one that is
    made there. StorageUnavailable names the place when it is full."""
    try:
        folder, lock = _create()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    except (OSError, StorageUnavailable) as exc:
        if not _no_place(exc):
            raise
        raise StorageUnavailable(
            f"{tempfile.gettempdir()}: no space left for temporary files; free some, or set TMPDIR to a "
            "folder of a larger disk"
        ) from exc


def _create() -> tuple[Path, int]:
    """A new folder and the descriptor that locks it."""
    place = Path(tempfile.gettempdir())
    # One at a time: between its birth and its lock a folder looks like one that nobody holds.
    with (place / f".maskclip-{os.getuid()}.lock").open("wb") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        for old in place.glob(f"{PREFIX}*"):
            _remove_if_free(old)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        return folder, _locked(folder)


def _remove_if_free(folder: Path) -> None:
    try:
        lock = _locked(folder)
    except OSError:  # held, of another user, or just gone
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder; BlockingIOError if another one does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _no_place(exc: BaseException) -> bool:
    """Whether a local file could not be written for want of space; a put of a store names its own address."""
    if isinstance(exc, OSError):
        return exc.errno in _FULL
    cause = exc.__cause__
    # A store says where it read from, but what is full is the disk that it copied to.
    return isinstance(cause, OSError) and cause.errno in _FULL and ": get_file failed" in str(exc)
