"""Memory and disks of this process, looked at in a thread of its own: a mount that hangs stops nobody."""

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

_EVERY_SECONDS = 5.0


class MachineSampler:
    """`values` are the newest known; see the registry for their names. Close it when done."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.values: dict[str, float] = {}
        self._folders = tuple(folders)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="machine-sampler", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.is_set():
            self.values = _sample(self._folders)
            self._closed.wait(_EVERY_SECONDS)


def memory_bytes() -> dict[str, int]:
    """host_bytes where the system tells, device_bytes where there is CUDA; see the registry."""
    found: dict[str, int] = {}
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux
        found["host_bytes"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        found["device_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _sample(folders: Sequence[str]) -> dict[str, float]:
    values: dict[str, float] = {**memory_bytes()}
    free = [share for folder in folders if (share := _free_ratio(Path(folder))) is not None]
    if free:
        values["disk_free_ratio"] = min(free)
    return values


def _free_ratio(folder: Path) -> float | None:
    """Of the disk that `folder`, or its nearest parent that exists, lies on."""
    for place in (folder, *folder.parents):
        try:
            usage = shutil.disk_usage(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return usage.free / usage.total
    return None
