"""An object store in a local (or network-mounted) folder.

A write goes to a temporary file in the same folder, is forced to disk, and takes its name in one step:
os.replace for a plain put, os.link (which refuses an existing name) for put_if_absent. A process that dies in
between leaves a temporary file that no reader sees.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cluster.errors import DataError
from cluster.store_base import (
    TEMPORARY,
    Fault,
    Listing,
    ObjectInfo,
    ObjectStore,
    Pieces,
    StoreConfig,
    checked_key,
    staged,
)

# What a network mount says while its server is away for a moment.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EHOSTDOWN}


class LocalStore(ObjectStore):
    """Objects are the regular files under the folder `uri` (an absolute path, made on the first write)."""

    def __init__(self, uri: str, config: StoreConfig) -> None:
        super().__init__(uri, config)
        self.root = Path(uri)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        return self._run("get", key, path.read_bytes)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        path = self._path(key)

        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(length)

        return self._run("get_range", key, read)

    def get_file(self, key: str, path: Path) -> None:
        source = self._path(key)

        def copy() -> None:
            with source.open("rb") as file, staged(path) as temporary:
                _write(temporary, lambda out: shutil.copyfileobj(file, out, 1 << 20))
                temporary.replace(path)

        self._run("get_file", key, copy)

    def size(self, key: str) -> int:
        path = self._path(key)

        def stat() -> int:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
            return path.stat().st_size

        return self._run("size", key, stat)

    def put(self, key: str, data: bytes) -> None:
        self._put(key, lambda out: out.write(data))

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as source:

            def copy(out: BinaryIO) -> None:
                source.seek(0)
                shutil.copyfileobj(source, out, 1 << 20)

            self._put(key, copy)

    def put_pieces(self, key: str, pieces: Pieces) -> None:
        self._put(key, lambda out: out.writelines(pieces()))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self._path(key)

        def link() -> bool:
            with staged(target) as temporary:
                _write(temporary, lambda out: out.write(data))
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    # A network mount may repeat a request that had succeeded: then the name there is ours.
                    return target.samefile(temporary)
                _sync_folder(target.parent)
            return True

        return self._run("put_if_absent", key, link)

    def list(self, prefix: str = "") -> Listing:
        folder = self.root / prefix.rpartition("/")[0]
        return self._run("list", prefix, lambda: sorted(self._walk(folder, prefix)))

    def delete(self, key: str) -> None:
        path = self._path(key)
        self._run("delete", key, lambda: path.unlink(missing_ok=True))

    def child(self, prefix: str) -> LocalStore:
        return LocalStore(str(self._path(prefix)), self.config)

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def _put(self, key: str, fill: Callable[[BinaryIO], object]) -> None:
        target = self._path(key)
        self._run("put", key, lambda: write_whole(target, fill))

    def _walk(self, folder: Path, prefix: str) -> Listing:
        found = []
        for parent, _, names in os.walk(folder, onerror=_raise_unless_absent):
            for name in names:
                path = Path(parent, name)
                key = path.relative_to(self.root).as_posix()
                if name.startswith(TEMPORARY) or not key.startswith(prefix):
                    continue
                try:
                    found.append(ObjectInfo(key, path.stat().st_size))
                except FileNotFoundError:
                    continue  # deleted since the folder was read
                except OSError as exc:
                    if exc.errno != errno.ELOOP:
                        raise
                    raise DataError(
                        f"{path}: is a symbolic link that leads back to itself; remove it or correct it"
                    ) from None
        return found

    def _fault(self, exc: BaseException) -> Fault | None:
        if isinstance(exc, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            return Fault.MISSING
        if isinstance(exc, OSError):
            if exc.errno == errno.ELOOP:
                return Fault.MISSING
            return Fault.TRANSIENT if exc.errno in _TRANSIENT else Fault.FATAL
        return None


def write_whole(target: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Put what `fill` writes in the place of `target`, on disk before this returns. Raises OSError, and
    StorageUnavailable where a file is in the way of its folder."""
    with staged(target) as temporary:
        _write(temporary, fill)
        temporary.replace(target)
        _sync_folder(target.parent)


def _raise_unless_absent(exc: OSError) -> None:
    """For os.walk, which otherwise takes a folder that it may not read for an empty one."""
    if not isinstance(exc, FileNotFoundError | NotADirectoryError):
        raise exc


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    with path.open("xb") as out:
        fill(out)
        out.flush()
        os.fsync(out.fileno())


def _sync_folder(folder: Path) -> None:
    """Force the new name itself to disk: fsync of a file does not cover its directory entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
