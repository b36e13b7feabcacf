"""Reads WebDataset tars, and finds every way in which one can be cut or broken.

`tarfile` takes a tar that ends or breaks between two members for a whole one, so the sizes of the members and
the end of the archive are checked here.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cluster.errors import ShardCorrupt
from data_pipeline.ingest.sample_files import READ_EXTENSIONS, SampleFiles, split_name

_END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE
# What else is found under the name of a tar, by its first bytes.
_OTHER_FILES = {
    b"PK\x03\x04": "a zip",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\0": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"PAR1": "a Parquet table",
}


def read_tar(path: Path, shown: str) -> Iterator[SampleFiles]:
    """Yield the samples of the tar at `path`, called `shown` in messages, in stored order.

    Raises:
        ShardCorrupt: the tar is truncated or broken, the members of a key are not adjacent, or a member is
            there twice; the message has the byte offset. Samples before it were yielded, the one that is cut
            was not.
    """
    files: SampleFiles | None = None
    finished: set[str] = set()
    for offset, key, extension, payload in _read_members(path, shown):
        if files is None or key != files.key:
            if files is not None:
                finished.add(files.key)
                yield files
            if key in finished:
                raise ShardCorrupt(
                    f"{shown}: the members of key {key!r} are not adjacent, one more is at byte {offset}; "
                    "sort the tar by name"
                )
            files = SampleFiles(key)
        if extension in files.extensions:
            raise ShardCorrupt(
                f"{shown}: {key}.{extension} is there twice, again at byte {offset}; remove one"
            )
        files.extensions.append(extension)
        if payload is not None:
            files.payloads[extension] = payload
    if files is not None:
        yield files


def _read_members(path: Path, shown: str) -> Iterator[tuple[int, str, str, bytes | None]]:
    """Header's offset, key, extension, and payload where it is of use, of every file of the tar with a
    key."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not 0 <= member.size <= size - member.offset_data:
                        raise ShardCorrupt(
                            f"{shown}: truncated at byte {size}, inside {member.name!r}; fetch it again"
                        )
                    split = split_name(member.name) if member.isreg() else None
                    if split is not None:
                        content = tar.extractfile(member) if split[1] in READ_EXTENSIONS else None
                        yield member.offset, *split, content and content.read()
                    # Else the headers of all members would stay in memory.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                _check_end(file, tar.offset, size, shown)
        except (tarfile.TarError, ValueError) as error:
            broken = f"{shown}: broken before byte {file.tell()} ({error}); fetch it again"
            raise ShardCorrupt(_no_tar(file, shown) or broken) from error


def _no_tar(file: BinaryIO, shown: str) -> str | None:
    """What to say of a file that cannot be read because it is no tar; None: it may be one."""
    file.seek(0)
    block = file.read(tarfile.BLOCKSIZE)
    other = next((name for magic, name in _OTHER_FILES.items() if block.startswith(magic)), None)
    if other:
        return f"{shown}: is no tar but {other}; put plain tars there"
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.InvalidHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
        return f"{shown}: is no tar, there is no header at byte 0; put plain tars there, or fetch it again"
    except tarfile.HeaderError:
        pass  # empty, or cut off
    return None


def _check_end(file: BinaryIO, offset: int, size: int, shown: str) -> None:
    """The archive must end with two blocks of zeros, and nothing else may follow."""
    file.seek(offset)
    tail = file.read(_END_OF_ARCHIVE)
    if tail.strip(b"\0"):
        raise ShardCorrupt(f"{shown}: no tar header at byte {offset}; fetch it again")
    if len(tail) < _END_OF_ARCHIVE:
        raise ShardCorrupt(f"{shown}: truncated at byte {size}, between two members; fetch it again")
    while tail := file.read(1 << 20):
        if tail.strip(b"\0"):
            raise ShardCorrupt(f"{shown}: the tar ends at byte {offset}, but data follows; write it as one")
