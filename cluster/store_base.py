"""What an object store is, and the one place where its transient faults are retried."""

from __future__ import annotations

import math
import secrets
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from cluster.errors import ObjectNotFound, StorageUnavailable

# Names of files that are still being written. Keys must not contain them, and listings never show them.
TEMPORARY = ".tmp-"

_LONGEST_BACKOFF_SECONDS = 30.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How patient a store is."""

    deadline_seconds: float = 120.0
    """Longest time of one attempt, after which it has failed; large transfers get more, by size."""
    attempts: int = 5
    """Attempts of one operation, the first included."""
    backoff_seconds: float = 0.2
    """Scale of the random delay between attempts; it doubles each time."""

    def __post_init__(self) -> None:
        if not 0 < self.deadline_seconds < math.inf:
            raise ValueError(f"{self.deadline_seconds} is no deadline: set store.deadline_seconds above 0")
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}: set store.attempts to 1 or more")
        if not 0 <= self.backoff_seconds < math.inf:
            raise ValueError(f"{self.backoff_seconds} is no delay: set store.backoff_seconds to 0 or more")


@dataclass
class StoreTotals:
    """What the stores of this process have done; an absent object is no error."""

    requests: int = 0
    retries: int = 0
    errors: int = 0
    seconds: float = 0.0
    """Retries and their delays included."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, attempts: int, seconds: float, *, failed: bool) -> None:
        """One operation."""
        with self._lock:
            self.requests += 1
            self.retries += max(0, attempts - 1)
            self.errors += failed
            self.seconds += seconds


TOTALS = StoreTotals()


class ObjectInfo(NamedTuple):
    """One object of a listing: its key relative to the store, and its size in bytes."""

    key: str
    size: int


Pieces = Callable[[], Iterator[bytes | memoryview]]
"""The bytes of an object in order; every call begins again, for another attempt."""

# `list` is also the name of a method below, so the builtin needs another name in annotations.
Listing = list[ObjectInfo]


class Fault(Enum):
    """What a store's exception means for the operation that met it."""

    MISSING = "missing"
    TRANSIENT = "transient"
    FATAL = "fatal"


class ObjectStore(ABC):
    """A flat set of objects under one address. Keys are relative, with `/` between parts.

    Every write is atomic: an object is there whole or not at all. Reads of an absent object raise
    ObjectNotFound. Transient faults are retried; when they stay, or when access is refused, the operation
    raises StorageUnavailable. A store pickles to its address and opens its own connection in the process that
    loads it. It may be used from many threads.
    """

    def __init__(self, uri: str, config: StoreConfig) -> None:
        self.uri = uri
        self.config = config

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str, StoreConfig]]:
        return type(self), (self.uri, self.config)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of the object, cut at its end like a Python slice."""

    @abstractmethod
    def get_file(self, key: str, path: Path) -> None:
        """Copy the object to the local `path`, which appears whole or not at all."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Size in bytes."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write the object, in place of what was there."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """Write the object from a local file, in place of what was there; the file must exist."""

    def put_pieces(self, key: str, pieces: Pieces) -> None:
        """Write the object from pieces in memory, in place of what was there."""
        with tempfile.TemporaryDirectory(prefix="maskclip-") as folder:
            path = Path(folder, "object")
            with path.open("wb") as out:
                out.writelines(pieces())
            self.put_file(key, path)

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object only if there is none: True if this call wrote it, False if it was there.

        Of any number of racing writers exactly one gets True, also when answers of the server are lost.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Listing:
        """All objects whose key starts with `prefix`, at any depth, sorted by key. Never cached."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""

    @abstractmethod
    def child(self, prefix: str) -> ObjectStore:
        """The store of everything under `prefix/`."""

    @abstractmethod
    def _fault(self, exc: BaseException) -> Fault | None:
        """What `exc` means; None if it does not come from the store."""

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self.size(key)
        except ObjectNotFound:
            return False
        return True

    def _run(self, operation: str, key: str, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it succeeds, fails for good, or has used up its attempts."""
        retrying = Retrying(
            retry=retry_if_exception(lambda exc: self._fault(exc) is Fault.TRANSIENT),
            stop=stop_after_attempt(self.config.attempts),
            wait=wait_random_exponential(self.config.backoff_seconds, _LONGEST_BACKOFF_SECONDS),
            reraise=True,
        )
        started, failed = time.monotonic(), False
        try:
            return retrying(attempt)
        except Exception as exc:
            fault = self._fault(exc)
            failed = fault is not Fault.MISSING
            if fault is None:
                raise
            address = f"{self.uri}/{key}" if key else self.uri
            if fault is Fault.MISSING:
                raise ObjectNotFound(f"{address}: no such object") from exc
            count = retrying.statistics["attempt_number"]
            attempts = "1 attempt" if count == 1 else f"{count} attempts"
            raise StorageUnavailable(
                f"{address}: {operation} failed after {attempts}: {_one_line(exc)}"
            ) from exc
        finally:
            made = retrying.statistics.get("attempt_number", 1)
            TOTALS.add(made, time.monotonic() - started, failed=failed)


def checked_key(key: str) -> str:
    """`key` itself. ValueError when it could leave its store or name a file that is being written."""
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts) or "\0" in key:
        raise ValueError(f"not an object key: {key!r}")
    return key


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A fresh temporary path beside `target`, gone afterwards if it was not moved to its place."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as exc:
        raise StorageUnavailable(
            f"{target}: cannot be written, {exc.filename} is a file and not a folder"
        ) from exc
    temporary = target.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _one_line(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
