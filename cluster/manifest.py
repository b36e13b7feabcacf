"""A folder is real only when its manifest is there.

Data sets, checkpoints and exports are folders of immutable files plus one `manifest.json`, written last and
only if absent. The manifest names every file with size and SHA-256, so a reader can tell a whole folder from
a half-written one and a good file from a damaged one. Its own SHA-256 (`Manifest.digest`) identifies the
folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import ManifestMismatch, ObjectNotFound
from cluster.store_base import ObjectStore, checked_key

MANIFEST = "manifest.json"

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder: its key, its size in bytes, its SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a committed folder holds. `kind` and `version` say how to read it, `meta` belongs to the kind."""

    kind: str
    version: int
    files: tuple[FileEntry, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal manifests give equal bytes. ValueError for a NaN or infinity in `meta`."""
        document = {
            "kind": self.kind,
            "version": self.version,
            "files": [vars(entry) for entry in sorted(self.files, key=lambda entry: entry.name)],
            "meta": self.meta,
        }
        text = json.dumps(
            document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def commit(store: ObjectStore, manifest: Manifest) -> bool:
    """Make the folder real. True if this call did it, False if the identical manifest was there.

    Raises ManifestMismatch when another manifest is there: committed folders never change.
    """
    data = manifest.to_bytes()
    if store.put_if_absent(MANIFEST, data):
        return True
    if store.get(MANIFEST) == data:
        return False
    raise ManifestMismatch(
        f"{store.uri}: already holds another committed {manifest.kind}, which is never overwritten; "
        "choose another folder or delete this one"
    )


def load(store: ObjectStore, kind: str, version: int = 1) -> Manifest:
    """The manifest of a committed `kind`; `version` is the newest format that the caller understands.

    Raises ObjectNotFound when the folder is not committed, ManifestMismatch when it is not what is asked for.
    """
    return load_with_bytes(store, kind, version)[0]


def load_with_bytes(store: ObjectStore, kind: str, version: int = 1) -> tuple[Manifest, bytes]:
    """As `load`, with the stored bytes, for who checks these themselves."""
    try:
        data = store.get(MANIFEST)
    except ObjectNotFound:
        raise ObjectNotFound(f"{store.uri}: no {MANIFEST}, so this is not a committed {kind}") from None
    try:
        manifest = _parse(data)
    except (ValueError, TypeError, KeyError) as exc:
        raise ManifestMismatch(
            f"{store.uri}/{MANIFEST}: not a manifest ({type(exc).__name__}: {exc}); "
            "restore or rebuild the folder"
        ) from exc
    if manifest.kind != kind:
        raise ManifestMismatch(
            f"{store.uri}: holds a {manifest.kind}, not a {kind}; give the address of a {kind}"
        )
    if manifest.version > version:
        raise ManifestMismatch(
            f"{store.uri}: {kind} format {manifest.version} is newer than {version}, the newest that "
            "this program reads; update the program"
        )
    return manifest, data


def verify(store: ObjectStore, manifest: Manifest, deep: bool = True) -> list[str]:
    """One line per file that is missing or has another size, or (`deep`) another checksum.

    Files are read in pieces of 8 MiB, so memory stays bounded.
    """
    sizes = dict(store.list())
    problems = []
    for entry in manifest.files:
        where = f"{store.uri}/{entry.name}"
        size = sizes.get(entry.name)
        if size is None:
            problems.append(f"{where}: missing")
        elif size != entry.size:
            problems.append(f"{where}: size {size}, manifest says {entry.size}")
        elif deep and (found := sha256_object(store, entry.name, entry.size)) != entry.sha256:
            problems.append(f"{where}: sha256 {found}, manifest says {entry.sha256}")
    return problems


def sha256_file(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path, name: str) -> FileEntry:
    """The entry of a local file that is (to be) stored under the key `name`."""
    return FileEntry(name, path.stat().st_size, sha256_file(path))


def sha256_object(store: ObjectStore, key: str, size: int) -> str:
    """SHA-256 of the first `size` bytes of a stored object, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    for start in range(0, size, _PIECE_BYTES):
        digest.update(store.get_range(key, start, min(_PIECE_BYTES, size - start)))
    return digest.hexdigest()


def _parse(data: bytes) -> Manifest:
    document = json.loads(data)
    files = tuple(
        FileEntry(checked_key(entry["name"]), int(entry["size"]), str(entry["sha256"]))
        for entry in document["files"]
    )
    return Manifest(str(document["kind"]), int(document["version"]), files, dict(document["meta"]))
