"""Part records: what each rank says of its file when it is in the store.

`checkpoints/step-000000200/parts/0003-rank-00001.json` of attempt 3. They replace a barrier: no rank waits
for another, only the first one reads them, until all are there or its patience ends.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from cluster.manifest import FileEntry
from cluster.store import ObjectStore

FOLDER = "parts"


@dataclass(frozen=True)
class Part:
    """One rank's share of a checkpoint."""

    attempt: int
    rank: int
    ranks: int
    name: str
    size: int
    sha256: str
    crc32: str
    digest_sum: str
    """Share of the state digest, 16 hexadecimal digits."""
    write_seconds: float
    upload_seconds: float

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self.name, self.size, self.sha256)


def file_name(attempt: int, rank: int) -> str:
    """No attempt writes over a file of another one, so what is committed stays as it is."""
    return f"rank-{rank:05d}.attempt-{attempt:04d}.safetensors"


def part_key(attempt: int, rank: int) -> str:
    return f"{FOLDER}/{attempt:04d}-rank-{rank:05d}.json"


def put_part(store: ObjectStore, part: Part) -> None:
    store.put(part_key(part.attempt, part.rank), json.dumps(asdict(part), sort_keys=True).encode())


def collect_parts(
    store: ObjectStore, attempt: int, ranks: int, check: Callable[[], None], poll_seconds: float
) -> list[Part]:
    """The records of all ranks of this attempt, by rank. `check` is called between two looks, and raises when
    it is time to give up."""
    found: dict[str, Part] = {}
    wanted = {part_key(attempt, rank) for rank in range(ranks)}
    while True:
        there = {info.key for info in store.list(f"{FOLDER}/{attempt:04d}-")}
        for key in sorted(wanted & there - found.keys()):
            found[key] = Part(**json.loads(store.get(key)))
        if len(found) == ranks:
            return [found[key] for key in sorted(found)]
        check()
        time.sleep(poll_seconds)
