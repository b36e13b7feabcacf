"""The copy of a rank's share of the state that is written while training goes on.

One host buffer holds the file as it will be, but for its header. It is made once and used again for every
save, so that taking a snapshot is nothing but a copy.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch

from system.checkpoints.state_digest import run_sum

PIECE_BYTES = 8 << 20
"""So many bytes are written at once."""


class Snapshot:
    """A safetensors file in memory: fp32 tensors by name, byte for byte what the library would write."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            tensors: flat tensors [length]; later ones must have the same names and lengths.
        """
        header, end = {}, 0
        for name in sorted(tensors):
            start, end = end, end + 4 * tensors[name].numel()
            header[name] = {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        cuda = any(tensor.is_cuda for tensor in tensors.values())
        self._buffer = torch.empty(end // 4, dtype=torch.float32, pin_memory=cuda)
        bounds = [0, *(info["data_offsets"][1] // 4 for info in header.values())]
        self._views = {
            name: self._buffer[first:last]
            for name, (first, last) in zip(header, pairwise(bounds), strict=True)
        }

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._header) + 4 * self._buffer.numel()

    def touch(self) -> None:
        """Have the system give the memory now, and not during the first copy."""
        self._buffer.zero_()

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the state; it may change as soon as this returns."""
        names = list(self._views)
        views = [self._views[name] for name in names]
        values = [tensors[name] for name in names]
        torch._foreach_copy_(views, values, self._buffer.is_pinned())  # type: ignore[attr-defined]
        if self._buffer.is_pinned():
            torch.cuda.synchronize()

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file in order."""
        data = self._buffer.numpy().view("u1").data
        parts = (data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES))
        yield self._header
        yield from parts

    def digest_sum(self) -> int:
        """This rank's share of the state digest: masters and the teacher."""
        total = 0
        for key, values in self._views.items():
            kind, parameter, start = key.split("/")
            if kind in ("master", "teacher"):
                name = parameter if kind == "master" else f"teacher/{parameter}"
                total += run_sum(name, int(start), values.numpy())
        return total
