"""Copies of checkpoint files on a disk of the node, so that a restart there need not download them.

They lie at `FOLDER/<digest of the run's address>/step-000000200/`. A copy counts only when its size and its
checksum are those of the committed manifest; nothing else about it is trusted.
"""

import hashlib
import re
import shutil
from pathlib import Path

from cluster.manifest import FileEntry
from cluster.store_base import Pieces, StoreConfig
from cluster.store_local import LocalStore
from system.checkpoints.checkpoint import step_folder
from system.checkpoints.checksum import Running

_PIECE_BYTES = 8 << 20
_STEP = re.compile(r"step-(\d{9})")


class LocalTier:
    def __init__(self, folder: str, run_uri: str, keep: int) -> None:
        """
        Args:
            keep: newest steps whose files stay.
        """
        self._root = Path(folder).expanduser().absolute() / hashlib.sha256(run_uri.encode()).hexdigest()[:16]
        self._keep = keep

    def write(self, step: int, name: str, pieces: Pieces) -> Path:
        """Write a file of `step`, then let older steps go, and later ones, which are trained again.

        Raises StorageUnavailable when the disk is full or refuses.
        """
        folder = self._root / step_folder(step)
        LocalStore(str(folder), StoreConfig()).put_pieces(name, pieces)
        steps = {
            int(match[1]): path for path in self._root.iterdir() if (match := _STEP.fullmatch(path.name))
        }
        kept = sorted(found for found in steps if found <= step)[-self._keep :]
        for found, path in steps.items():
            if found not in kept:
                shutil.rmtree(path, ignore_errors=True)  # another rank of the node may be at it as well
        return folder / name

    def find(self, step: int, entry: FileEntry, running: Running, expected: str) -> Path | None:
        """The copy of a committed file; None if there is none or it is not what was committed, which is what
        `running` comes to `expected` for."""
        path = self._root / step_folder(step) / entry.name
        try:
            if path.stat().st_size == entry.size:
                with path.open("rb") as file:
                    while piece := file.read(_PIECE_BYTES):
                        running.update(piece)
                if running.hexdigest() == expected:
                    return path
        except OSError:
            pass
        return None
