"""Reads an event log again and again, and each time only what is new.

A trainer numbers the segments of a rank without gaps and writes each once. A log that is copied while it is
written, or that lost parts, is read all the same: a segment counts up to its last whole line and is read on
when it has grown; one that is missing is passed over and read if it comes.
"""

import re
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ObjectNotFound
from cluster.events import decode_events
from cluster.store import ObjectStore

_SEGMENT = re.compile(r"events/attempt-(\d+)/rank-(\d+)/segment-(\d+)\.jsonl")
_LONGEST_NUMBER = 10_000_000
_READERS = 8
_BYTES_AHEAD = 8 << 20
"""Read side by side before the first of them is taken in."""
_LIST_SECONDS = 5.0
_LIST_SHARE = 10
"""A listing of a long log takes time: at most a tenth of it goes into listings."""


_Unread = tuple[tuple[int, int], int, int]
"""(attempt, rank), number and size of a segment."""


@dataclass
class _Stream:
    """The segments of one rank in one attempt: how many bytes of each are read."""

    read: array = field(default_factory=lambda: array("Q"))

    def taken(self, number: int) -> int:
        return self.read[number] if number < len(self.read) else 0

    def take(self, number: int, size: int) -> None:
        while len(self.read) <= number:
            self.read.append(0)
        self.read[number] = size


@dataclass(frozen=True)
class Batch:
    """What one look at one segment gave."""

    events: list[dict[str, Any]]
    torn: int
    """Whole lines that are no events."""
    done: float
    """Share of the listed bytes that are read, this segment included."""


class LogReader:
    """The place in the log of `run` up to which it is read. For one thread."""

    def __init__(self, run: ObjectStore) -> None:
        self._run = run
        self._streams: dict[tuple[int, int], _Stream] = {}
        self._next_listing = 0.0

    def unread(self) -> Iterator[Batch]:
        """What came since the last call, attempt by attempt, first ranks first.

        Between listings only the newest segment of the first rank is asked for, by its name.
        """
        if time.monotonic() >= self._next_listing:
            started = time.monotonic()
            listed = self._listed()
            ended = time.monotonic()
            self._next_listing = ended + max(_LIST_SECONDS, _LIST_SHARE * (ended - started))
            yield from self._read(listed)
        else:
            yield from self._follow()

    def _listed(self) -> list[_Unread]:
        """The segments that have bytes to read, in order."""
        found = []
        for info in self._run.list("events/"):
            match = _SEGMENT.fullmatch(info.key)
            if match is None:
                continue
            attempt, rank, number = map(int, match.groups())
            if number > _LONGEST_NUMBER:
                continue
            if info.size > self._stream((attempt, rank)).taken(number):
                found.append(((attempt, rank), number, info.size))
        return sorted(found)

    def _read(self, listed: list[_Unread]) -> Iterator[Batch]:
        total = sum(size for _, _, size in listed) or 1
        done = 0
        with ThreadPoolExecutor(_READERS) as pool:
            for part in _parts(listed):
                datas = pool.map(lambda item: self._bytes(*item), part)
                for (key, number, size), data in zip(part, datas, strict=True):
                    done += size
                    yield self._take(key, number, data, done / total)

    def _follow(self) -> Iterator[Batch]:
        first_ranks = [key for key in self._streams if key[1] == 0]
        if not first_ranks:
            return
        newest = max(first_ranks)
        while True:
            number = len(self._streams[newest].read)
            try:
                data = self._run.get(_key(newest, number))
            except ObjectNotFound:
                return
            yield self._take(newest, number, data, 1.0)

    def _bytes(self, stream: tuple[int, int], number: int, size: int) -> bytes:
        taken = self._stream(stream).taken(number)
        try:
            return self._run.get_range(_key(stream, number), taken, size - taken)
        except ObjectNotFound:  # deleted since it was listed
            return b""

    def _take(self, key: tuple[int, int], number: int, data: bytes, done: float) -> Batch:
        whole = data.rfind(b"\n") + 1
        stream = self._stream(key)
        stream.take(number, stream.taken(number) + whole)
        events = decode_events(data[:whole])
        return Batch(events, data.count(b"\n", 0, whole) - len(events), done)

    def _stream(self, key: tuple[int, int]) -> _Stream:
        return self._streams.setdefault(key, _Stream())


def _parts(listed: list[_Unread]) -> Iterator[list[_Unread]]:
    """The same in order, cut where `_BYTES_AHEAD` are full."""
    part: list[_Unread] = []
    for item in listed:
        part.append(item)
        if sum(size for _, _, size in part) >= _BYTES_AHEAD:
            yield part
            part = []
    if part:
        yield part


def _key(stream: tuple[int, int], number: int) -> str:
    return f"events/attempt-{stream[0]:04d}/rank-{stream[1]:05d}/segment-{number:06d}.jsonl"
