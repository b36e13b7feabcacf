"""The checksum that a restore makes of what it reads: CRC-32, which costs a tenth of a SHA-256 or less.

It finds every flipped bit and, with the size, every truncation. The SHA-256 beside it in the manifest is what
identifies a file, and what a save is read back against.
"""

import hashlib
from typing import Protocol

from zlib_ng.zlib_ng import crc32

from cluster.manifest import FileEntry, Manifest

CRC32 = "crc32"
"""Key of a manifest's `meta`: file name -> 8 hexadecimal digits."""


class Running(Protocol):
    """A checksum in the making."""

    @property
    def name(self) -> str: ...
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class Crc32:
    name = CRC32

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def expected(manifest: Manifest, entry: FileEntry) -> tuple[Running, str]:
    """What to make of a file, and what it must come to. A manifest of before has no CRC-32."""
    known = manifest.meta.get(CRC32, {}).get(entry.name)
    return (Crc32(), known) if known else (hashlib.sha256(), entry.sha256)
