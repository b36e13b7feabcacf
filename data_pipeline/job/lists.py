"""Allow and deny lists: files with one url, domain, sha256 or key per line, held as sorted 64-bit hashes.

100 million entries are 0.8 GB, and a search is 27 steps. A `.npy` file made by `write_list` is mapped, not
read, so all workers of a machine share one copy. Two different entries have the same hash once in 1.8e19
pairs: against 100 million entries, one in 180 billion lookups is wrong.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np

from cluster.errors import ConfigError, DataError
from cluster.scratch import scratch_folder
from cluster.store import ObjectStore, open_store

ListKind = Literal["urls", "domains", "sha256", "keys"]

_BLOCK = 1 << 20
_PORTS = {"http": 80, "https": 443}
# Nearly every address of a table is in its canonical form as it stands; this tells it in a tenth of the time.
_CANONICAL = re.compile(r"https?://[a-z0-9-]+(?:\.[a-z0-9-]+)*/(?:[^#\s]*[^#?\s])?")


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Files of one list, each with one entry per line (`.txt`, `.gz`), or made by `write_list` (`.npy`)."""

    urls: tuple[str, ...] = ()
    """Addresses; the fragment, an empty query, a default port and the case of scheme and host do not
    count."""
    domains: tuple[str, ...] = ()
    """Hosts; example.org is also every host that ends in .example.org."""
    sha256: tuple[str, ...] = ()
    """Of the original image's bytes, in hexadecimal."""
    keys: tuple[str, ...] = ()
    """Keys of rows, for example photo ids."""

    def files(self) -> list[tuple[ListKind, str]]:
        """Every file with its kind."""
        kinds: dict[ListKind, tuple[str, ...]] = {
            "urls": self.urls,
            "domains": self.domains,
            "sha256": self.sha256,
            "keys": self.keys,
        }
        return [(kind, uri) for kind, uris in kinds.items() for uri in uris]


class HashList:
    """A set of entries of one kind."""

    def __init__(self, kind: ListKind, arrays: list[np.ndarray]) -> None:
        self.kind: ListKind = kind
        self._arrays = arrays

    def __len__(self) -> int:
        return sum(len(array) for array in self._arrays)

    def has(self, entry: str) -> bool:
        """Whether the entry (for domains: an address) is in the list."""
        return any(self._has_hash(_hash(one)) for one in _forms(self.kind, entry))

    def _has_hash(self, value: int) -> bool:
        wanted = np.uint64(value)
        for array in self._arrays:
            at = int(array.searchsorted(wanted))
            if at < len(array) and array[at] == wanted:
                return True
        return False


def load_list(kind: ListKind, uris: tuple[str, ...]) -> HashList:
    """The list of these files together. A process reads each file once, unless its size changes.

    Raises:
        ConfigError: a file is not there.
        DataError: a `.npy` is not of `write_list`, or an sha256 is not one; names the line.
    """
    return HashList(kind, [_load(kind, uri) for uri in uris])


def write_list(kind: ListKind, uri: str, path: Path) -> int:
    """Turn a list of lines into the `.npy` that is mapped by every worker; returns the number of entries."""
    if path.suffix != ".npy":
        raise ConfigError(f"{path}: a mapped list ends in .npy: change the name")
    array = _load(kind, uri)
    np.save(path, array, allow_pickle=False)
    return len(array)


def lists_digest(*lists: ListConfig) -> str:
    """sha256 over kinds and contents of all files: part of what a data set is made of."""
    digest = hashlib.sha256()
    for one in lists:
        for kind, uri in one.files():
            store, name, size = _find(uri, kind)
            digest.update(f"{kind} {size}\n".encode())
            for start in range(0, size, _BLOCK * 16):
                digest.update(store.get_range(name, start, _BLOCK * 16))
        digest.update(b"\n")
    return digest.hexdigest()


def canonical_url(url: str) -> str:
    """The form in which addresses are compared; what is no address stays as it is."""
    url = url.partition("#")[0].strip()
    if _CANONICAL.fullmatch(url):
        return url
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return url
    if not parts.scheme or not host:
        return url
    host = f"[{host}]" if ":" in host else _ascii_host(host)
    login = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    place = f"{login}{host}" if port in (None, _PORTS.get(parts.scheme)) else f"{login}{host}:{port}"
    return parts._replace(netloc=place, path=parts.path or "/").geturl().strip()  # " ?" leaves a blank


def host_of(url: str) -> str:
    """The host of an address, lower case and in ASCII; "" if it has none."""
    try:
        return _ascii_host(urlsplit(url.strip()).hostname or "")
    except ValueError:
        return ""


def _ascii_host(host: str) -> str:
    host = host.lower().rstrip(".")
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


def _forms(kind: ListKind, entry: str) -> Iterator[str]:
    """What of an entry may stand in the list: of an address every domain that it lies in."""
    if kind == "domains":
        labels = host_of(entry).split(".")
        yield from (".".join(labels[i:]) for i in range(len(labels)) if labels[i])
    else:
        yield _listed(kind, entry)


def _listed(kind: ListKind, line: str) -> str:
    if kind == "urls":
        return canonical_url(line)
    if kind == "keys":
        return line.strip()
    if kind == "domains":
        return _ascii_host(line.strip().removeprefix("*").lstrip("."))
    entry = line.strip().lower()
    if len(entry) != 64 or not set(entry) <= set("0123456789abcdef"):
        raise ValueError(f"{line.strip()[:80]!r} is not a sha256 of 64 hexadecimal digits")
    return entry


def _hash(entry: str) -> int:
    data = entry.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _find(uri: str, kind: ListKind) -> tuple[ObjectStore, str, int]:
    folder, _, name = uri.rpartition("/")
    store = open_store(folder or ("/" if uri.startswith("/") else "."))
    if not name or not store.exists(name):
        raise ConfigError(f"{uri}: no such file: change filters.allow.{kind} or filters.deny.{kind}")
    return store, name, store.size(name)


@lru_cache(maxsize=64)
def _load_cached(kind: ListKind, folder: str, name: str, size: int) -> np.ndarray:
    # The size is in the key, so that a list that grew is read again.
    store = open_store(folder)
    with scratch_folder() as temporary:
        local = Path(folder, name)
        if not local.is_file():
            local = temporary / "list"
            store.get_file(name, local)  # a mapping outlives the file's name
        if name.endswith(".npy"):
            return _mapped(local, f"{folder}/{name}")
        hashes = _hashes(kind, local, name.endswith(".gz"), f"{folder}/{name}")
        return np.unique(np.fromiter(hashes, dtype=np.uint64))


def _load(kind: ListKind, uri: str) -> np.ndarray:
    store, name, size = _find(uri, kind)
    return _load_cached(kind, store.uri, name, size)


def _mapped(path: Path, shown: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{shown}: not a list ({error}); make it with write_list") from error
    if array.dtype != np.uint64 or array.ndim != 1 or not _ascending(array):
        raise DataError(f"{shown}: not a list of hashes in order; make it with write_list")
    return array


def _ascending(array: np.ndarray) -> bool:
    blocks = (array[i : i + _BLOCK + 1] for i in range(0, len(array), _BLOCK))
    return all(bool(np.all(block[:-1] < block[1:])) for block in blocks)


def _hashes(kind: ListKind, path: Path, packed: bool, shown: str) -> Iterator[int]:
    opened = gzip.open if packed else open
    with opened(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not line.startswith("#"):
                try:
                    yield _hash(_listed(kind, line))
                except ValueError as error:
                    raise DataError(f"{shown}: line {number}: {error}; mend it") from None
