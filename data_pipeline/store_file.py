"""An object of a store as a read-only file: each read is one ranged read of the store, nothing is kept."""

from __future__ import annotations

import io

from cluster.errors import DataError
from cluster.store import ObjectStore


class StoreFile(io.RawIOBase):
    """Bytes [start, end) of an object as a seekable file; put a buffer around it for small reads.

    Reads raise DataError when the object ends before `end`: it shrank since its size was asked for.
    """

    def __init__(self, store: ObjectStore, name: str, start: int, end: int) -> None:
        super().__init__()
        self._store, self._name, self._start, self._end = store, name, start, end
        self._position = start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position - self._start

    def size(self) -> int:
        """Bytes from start to end; pyarrow asks."""
        return self._end - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: self._start, io.SEEK_CUR: self._position, io.SEEK_END: self._end}[whence]
        self._position = max(self._start, base + offset)
        return self.tell()

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._end - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        data = self._store.get_range(self._name, self._position, wanted)
        if len(data) != wanted:
            raise DataError(
                f"{self._store.uri}/{self._name}: ends {wanted - len(data)} bytes early; "
                "do not change the input while it is read"
            )
        self._position += wanted
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
