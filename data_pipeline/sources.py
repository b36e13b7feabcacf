"""Raw input: WebDataset tars or plain folders, cut into chunks that are known before any work starts.

The layout is img2dataset's: `<key>.jpg|png|webp`, `<key>.txt` (the caption) and `<key>.json` (metadata,
optional), in tars or loose. A key is a file's path up to the first dot of its name, as in WebDataset; names
that begin with a dot or have none are no samples. The parquet table beside a tar is not read.
"""

import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cluster.errors import DataError, ShardCorrupt
from cluster.store import ObjectStore, open_store
from data_pipeline.records import RawSample, Reject

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_READ_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "txt", "json"))
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the raw rows are."""

    uri: str
    """A local folder, or s3://bucket/prefix; its subfolders are read too."""
    kind: Literal["webdataset", "folder"] = "webdataset"
    """webdataset: tars. folder: loose image, .txt and .json files."""

    def __post_init__(self) -> None:
        if not self.uri:
            raise ValueError("source.uri is empty: set source.uri to the folder of the raw data")


@dataclass(frozen=True)
class Chunk:
    """A part of the input that one task reads: one tar, or a run of the samples of a folder."""

    index: int
    uri: str
    """Absolute, so that a worker anywhere opens the same store."""
    kind: Literal["webdataset", "folder"]
    names: tuple[str, ...]
    """Keys of the objects in the store at `uri`, sorted."""
    size: int
    """Bytes of these objects."""


@dataclass
class _Group:
    """The members of one key, as they are read."""

    key: str
    extensions: list[str] = field(default_factory=list)
    payloads: dict[str, bytes] = field(default_factory=dict)


def plan_chunks(source: SourceConfig, samples_per_chunk: int) -> list[Chunk]:
    """Cut the input into chunks, in order of name, by one listing. A tar is a chunk; folders are cut in runs.

    Raises:
        DataError: there is nothing of this kind at the uri.
    """
    store = open_store(source.uri)
    objects = store.list()
    groups: list[list[tuple[str, int]]]
    if source.kind == "webdataset":
        groups = [[(o.key, o.size)] for o in objects if o.key.endswith(".tar")]
    else:
        samples: dict[str, list[tuple[str, int]]] = {}
        for o in objects:
            split = split_name(o.key)
            if split is not None:
                samples.setdefault(split[0], []).append((o.key, o.size))
        runs = [samples[key] for key in sorted(samples)]
        groups = [
            [one for sample in runs[i : i + samples_per_chunk] for one in sorted(sample)]
            for i in range(0, len(runs), samples_per_chunk)
        ]
    if not groups:
        wanted = "*.tar file" if source.kind == "webdataset" else "image or caption file"
        raise DataError(f"{store.uri}: no {wanted} there; set source.uri to the folder of the raw data")
    return [
        Chunk(i, store.uri, source.kind, tuple(name for name, _ in group), sum(size for _, size in group))
        for i, group in enumerate(groups)
    ]


def plan_digest(chunks: Iterable[Chunk]) -> str:
    """sha256 over names and sizes: plans of one digest read the same files, as far as a listing can tell."""
    lines = [[list(chunk.names), chunk.size] for chunk in chunks]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def read_chunk(chunk: Chunk) -> Iterator[RawSample | Reject]:
    """Yield every row of the chunk once, in stored order; a row that cannot be one sample is a `Reject`.

    Raises:
        ShardCorrupt: the tar is truncated or broken, or the members of a key are not adjacent; the message
            has the byte offset.
        DataError: the input is not what was planned.
    """
    store = open_store(chunk.uri)
    if chunk.kind == "folder":
        for group in _read_folder(store, chunk):
            yield _to_row(group, group.key)
        return
    (name,) = chunk.names
    with tempfile.TemporaryDirectory(prefix="maskclip-") as folder:
        path = Path(folder) / "input.tar"
        store.get_file(name, path)
        if path.stat().st_size != chunk.size:
            raise DataError(
                f"{store.uri}/{name}: had {chunk.size} bytes, now {path.stat().st_size}; "
                "do not change the input while it is read"
            )
        for group in read_tar(path, f"{store.uri}/{name}"):
            # With the .tar in it: a.tar may hold b/c, and a/b.tar may hold c.
            yield _to_row(group, f"{name}/{group.key}")


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: (key, extension in lower case), or None where the name belongs to no sample."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2].lower()) if found else None


def read_tar(path: Path, shown: str) -> Iterator[_Group]:
    """Yield the samples of the tar at `path`, called `shown` in messages; raises as `read_chunk`."""
    group: _Group | None = None
    finished: set[str] = set()
    for offset, key, extension, payload in _read_members(path, shown):
        if group is None or key != group.key:
            if group is not None:
                finished.add(group.key)
                yield group
            if key in finished:
                raise ShardCorrupt(
                    f"{shown}: the members of key {key!r} are not adjacent, one more is at byte {offset}; "
                    "sort the tar by name"
                )
            group = _Group(key)
        if extension in group.extensions:
            raise ShardCorrupt(
                f"{shown}: {key}.{extension} is there twice, again at byte {offset}; remove one"
            )
        group.extensions.append(extension)
        if payload is not None:
            group.payloads[extension] = payload
    if group is not None:
        yield group


def _read_members(path: Path, shown: str) -> Iterator[tuple[int, str, str, bytes | None]]:
    """Header's offset, key, extension, and payload where it is of use, of every file of the tar with a key.

    `tarfile` takes a tar that ends or breaks between two members for a whole one, so the sizes of the members
    and the end of the archive are checked here.
    """
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
                        content = tar.extractfile(member) if split[1] in _READ_EXTENSIONS else None
                        yield member.offset, *split, content and content.read()
                _check_end(file, tar.offset, size, shown)
        except (tarfile.TarError, ValueError) as error:
            raise ShardCorrupt(
                f"{shown}: broken before byte {file.tell()} ({error}); fetch it again"
            ) from error


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


def _read_folder(store: ObjectStore, chunk: Chunk) -> Iterator[_Group]:
    group: _Group | None = None
    for name in chunk.names:
        split = split_name(name)
        assert split is not None  # the plan has only names of samples
        key, extension = split
        if group is None or key != group.key:
            if group is not None:
                yield group
            group = _Group(key)
        group.extensions.append(extension)
        if extension in _READ_EXTENSIONS:
            group.payloads[extension] = store.get(name)
    if group is not None:
        yield group


def _to_row(group: _Group, source: str) -> RawSample | Reject:
    # Broken names carry lone surrogates, which neither Arrow nor JSON can hold.
    key, source = (text.encode("utf-8", "backslashreplace").decode() for text in (group.key, source))

    def reject(reason: str, detail: str) -> Reject:
        return Reject(key, source, reason, detail)

    if key != group.key or key.startswith("/") or ".." in key.split("/"):
        return reject("unsafe_key", "not UTF-8, absolute, or with a .. in it")
    images = [e for e in group.extensions if e in IMAGE_EXTENSIONS]
    captions = group.extensions.count("txt")  # a folder may hold both a.txt and a.TXT
    found = f"has {', '.join(group.extensions)}"
    if len(images) != 1:
        return reject("several_images" if images else "no_image", found)
    if captions != 1:
        return reject("several_captions" if captions else "no_caption", found)
    try:
        caption = group.payloads["txt"].decode()
    except UnicodeDecodeError as error:
        return reject("bad_caption", str(error))
    try:
        meta = _parse_meta(group.payloads.get("json", b"{}"))
    except ValueError as error:
        return reject("bad_metadata", str(error))
    return RawSample(key, group.payloads[images[0]], caption, meta, source)


def _parse_meta(data: bytes) -> dict[str, Any]:
    # NaN and Infinity are not JSON, though Python writes them; they become null.
    meta = json.loads(data, parse_constant=lambda _: None)
    if not isinstance(meta, dict):
        raise ValueError(f"a JSON object is wanted, not {type(meta).__name__}")
    return meta
