"""safetensors files, one tensor at a time: written without holding the others, read by byte range.

Format: the header's size (8 bytes, little endian), the header (JSON, filled up with spaces to a multiple of
8), then the tensors' bytes. The library reads and writes whole files on a local disk only; what is written
here is byte for byte what it would write.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster.errors import DataError
from cluster.store import ObjectStore
from model.convert import Entry, Get
from system.checkpoints.checkpoint import HEADER_ERRORS, read_header

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_tensors(path: Path, entries: Iterable[Entry], get: Get) -> None:
    """Write fp32 tensors to a new file, sorted by name; each is made (from what `get` gives) in its turn."""
    entries = sorted(entries, key=lambda entry: entry.name)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + 4 * math.prod(entry.shape)
        header[entry.name] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            values = entry.make(get).detach().to(torch.float32).contiguous()
            if values.shape != entry.shape:
                raise ValueError(f"{entry.name} has the shape {tuple(values.shape)}, not {entry.shape}")
            file.write(values.numpy().astype("<f4", copy=False).data)


class TensorFile(Mapping[str, Tensor]):
    """Floating point tensors of a stored safetensors file by name; each access reads one of them.

    Raises:
        DataError: it is no whole safetensors file.
    """

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key = store, key
        self.uri = f"{store.uri}/{key}"
        try:
            self._header, self._start = read_header(store, key)
            end = max((info["data_offsets"][1] for info in self._header.values()), default=0)
        except HEADER_ERRORS as error:
            raise DataError(f"{self.uri}: not a safetensors file ({error}); give one") from None
        if store.size(key) != self._start + end:
            raise DataError(
                f"{self.uri}: {store.size(key):,} bytes, its header says {self._start + end:,}; copy it again"
            )

    def __getitem__(self, name: str) -> Tensor:
        info = self._header[name]
        if info["dtype"] not in _DTYPES:
            raise DataError(f"{self.uri}: {name} is {info['dtype']}, not a floating point tensor")
        first, last = info["data_offsets"]
        data = self._store.get_range(self._key, self._start + first, last - first)
        raw = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
        return raw.view(_DTYPES[info["dtype"]]).view(info["shape"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)
