"""Temporary folders of the workers, and a clear word when their disk is full."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import StorageUnavailable

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A fresh folder where TMPDIR says, gone afterwards. StorageUnavailable names it when it is full."""
    try:
        with tempfile.TemporaryDirectory(prefix="maskclip-") as name:
            yield Path(name)
    except (OSError, StorageUnavailable) as exc:
        if not _no_place(exc):
            raise
        raise StorageUnavailable(
            f"{tempfile.gettempdir()}: no space left for temporary files; free some, or set TMPDIR to a "
            "folder of a larger disk"
        ) from exc


def _no_place(exc: BaseException) -> bool:
    """Whether a local file could not be written for want of space; a put of a store names its own address."""
    if isinstance(exc, OSError):
        return exc.errno in _FULL
    cause = exc.__cause__
    # A store says where it read from, but what is full is the disk that it copied to.
    return isinstance(cause, OSError) and cause.errno in _FULL and ": get_file failed" in str(exc)
