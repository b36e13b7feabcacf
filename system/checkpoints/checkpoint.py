"""Reading checkpoints: which ones are committed, and any run of any parameter by byte range.

Format (docs/checkpoint-format.md): ``checkpoints/step-000000200/`` holds safetensors files and a
``manifest.json`` that was written last. A tensor ``<kind>/<parameter>/<start>`` is a flat fp32 run of
the parameter from element `start`; kinds are master, exp_avg, exp_avg_sq and teacher. Nothing here knows
how many ranks wrote it, or DeepSpeed.
"""

import hashlib
import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch

from cluster.errors import CheckpointIncompatible, DataError, ManifestMismatch, ObjectNotFound
from cluster.manifest import MANIFEST, Manifest, load_with_bytes
from cluster.store import ObjectStore

KIND = "checkpoint"
VERSION = 2
Kind = Literal["master", "exp_avg", "exp_avg_sq", "teacher"]
_STEP_FOLDER = re.compile(r"^step-(\d{9})/manifest\.json$")
_MERGE_GAP = 1 << 20
"""Ranges of a file that lie closer than this many bytes are fetched in one request."""
_LARGEST_READ = 8 << 20
"""Bytes of one request, so that what is read takes little memory beside what is filled."""
_LARGEST_HEADER = 100 << 20
"""Bytes; the limit of the safetensors library."""
HEADER_ERRORS = (ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged header raises."""

Run = tuple[str, str, int, int]
"""kind, parameter, start, length."""
Range = tuple[int, int, torch.Tensor]
"""Bytes [offset, offset + size) of a file, and where their values go: flat fp32, on any device."""


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says of itself."""

    step: int
    slot: int
    samples_seen: int
    digest: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A stored run of a parameter: elements [start, start + length) at byte `offset` of `file`."""

    start: int
    length: int
    file: str
    offset: int


def step_folder(step: int) -> str:
    return f"step-{step:09d}"


def committed_steps(run: ObjectStore) -> list[int]:
    """Steps whose manifest is there, ascending. Says nothing about whether the files verify."""
    matches = (_STEP_FOLDER.match(info.key) for info in run.child("checkpoints").list())
    return sorted(int(match[1]) for match in matches if match)


def open_checkpoint(run: ObjectStore, step: int) -> tuple[ObjectStore, Manifest]:
    """Raises ObjectNotFound when step has no committed checkpoint, naming those that are there, and
    ManifestMismatch when its manifest is damaged."""
    store = run.child(f"checkpoints/{step_folder(step)}")
    try:
        manifest, data = load_with_bytes(store, KIND, VERSION)
    except ObjectNotFound:
        steps = ", ".join(str(s) for s in committed_steps(run)[-5:]) or "none"
        raise ObjectNotFound(
            f"{run.uri}: no committed checkpoint at step {step}; committed steps: {steps}"
        ) from None
    if not _seal_holds(manifest, data):
        raise ManifestMismatch(f"{store.uri}/{MANIFEST}: is damaged, it is not what its seal says")
    return store, manifest


def sealed(manifest: Manifest) -> Manifest:
    """With the SHA-256 of its own bytes in it, so that no flipped bit of it goes unseen."""
    blank = replace(manifest, meta={**manifest.meta, "seal": ""})
    return replace(manifest, meta={**manifest.meta, "seal": blank.digest})


def _seal_holds(manifest: Manifest, data: bytes) -> bool:
    seal = manifest.meta.get("seal")
    if seal is None:
        return manifest.version < 2
    blank = data.replace(f'"seal":"{seal}"'.encode(), b'"seal":""')
    return hashlib.sha256(blank).hexdigest() == seal


def load_checkpoint_meta(run: ObjectStore, step: int) -> CheckpointMeta:
    _, manifest = open_checkpoint(run, step)
    meta = manifest.meta
    return CheckpointMeta(meta["step"], meta["slot"], meta["samples_seen"], manifest.digest, meta)


def newest_step(run: ObjectStore, step: int | None = None) -> int:
    """`step` itself, or the newest committed one. Raises ObjectNotFound when the run has none."""
    if step is not None:
        return step
    steps = committed_steps(run)
    if not steps:
        raise ObjectNotFound(
            f"{run.uri}: this run has no committed checkpoint; train it first or correct the URI"
        )
    return steps[-1]


class Source(Protocol):
    """Where the files are: an object store, or something in front of it."""

    uri: str

    def get_range(self, key: str, start: int, length: int, /) -> bytes: ...


Index = list[tuple[str, str, Piece]]
"""(kind, parameter, piece) of every tensor of a file."""


def read_header(source: Source, file: str) -> tuple[dict[str, dict[str, Any]], int]:
    """Of a safetensors file: what it says of each tensor, by name, and the byte at which their values begin.

    Raises:
        one of HEADER_ERRORS: it is none.
    """
    start = source.get_range(file, 0, 8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > _LARGEST_HEADER:
        raise ValueError("it does not begin with the size of a header")
    header = json.loads(source.get_range(file, 8, size))
    return {name: info for name, info in header.items() if name != "__metadata__"}, 8 + size


def read_index(source: Source, file: str) -> Index:
    """What a file says that it holds. Raises DataError when that is no header of our format."""
    try:
        header, begin = read_header(source, file)
        found = []
        for name, info in header.items():
            kind, parameter, start = name.split("/")
            first, last = info["data_offsets"]
            piece = Piece(int(start), (last - first) // 4, file, begin + first)
            found.append((kind, parameter, piece))
        return found
    except HEADER_ERRORS as error:
        raise DataError(f"{source.uri}/{file}: its header is damaged ({type(error).__name__})") from None


class FragmentReader:
    """Runs of parameters out of a committed checkpoint, by byte range."""

    def __init__(self, store: Source, manifest: Manifest, index: Iterable[Index] | None = None) -> None:
        """
        Args:
            index: `read_index` of all files, where it was read before.
        """
        self._store = store
        self.shapes: dict[str, list[int]] = manifest.meta["parameters"]
        self._pieces: dict[tuple[str, str], list[Piece]] = defaultdict(list)
        if index is None:
            index = (read_index(store, entry.name) for entry in manifest.files)
        for of_file in index:
            for kind, parameter, piece in of_file:
                self._pieces[kind, parameter].append(piece)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)

    def parameters(self, kind: str) -> list[str]:
        return sorted(parameter for k, parameter in self._pieces if k == kind)

    def read(self, runs: list[Run]) -> list[torch.Tensor]:
        """
        Returns:
            Flat fp32 tensors [length], in the order of `runs`.
        Raises:
            CheckpointIncompatible: the checkpoint does not cover a run.
        """
        tensors = [torch.empty(length, dtype=torch.float32) for *_, length in runs]
        for file, ranges in self.ranges(runs, tensors).items():
            self.fetch(file, ranges)
        return tensors

    def whole(self, kind: Kind, parameter: str) -> torch.Tensor:
        """A parameter in its full shape, fp32. Raises CheckpointIncompatible as `read`."""
        shape = self.shapes[parameter]
        return self.read([(kind, parameter, 0, math.prod(shape))])[0].view(shape)

    def everything(self, kind: Kind) -> dict[str, torch.Tensor]:
        """Every parameter that has `kind`, by name, in its full shape, fp32."""
        names = self.parameters(kind)
        flat = self.read([(kind, name, 0, math.prod(self.shapes[name])) for name in names])
        return {name: tensor.view(self.shapes[name]) for name, tensor in zip(names, flat, strict=True)}

    def ranges(self, runs: list[Run], targets: list[torch.Tensor]) -> dict[str, list[Range]]:
        """Which bytes of which files go where in the flat `targets`, in the order of the file.

        Raises:
            CheckpointIncompatible: the checkpoint does not cover a run.
        """
        wanted: dict[str, list[Range]] = defaultdict(list)
        for (kind, parameter, start, length), target in zip(runs, targets, strict=True):
            covered = 0
            for piece in self._pieces.get((kind, parameter), ()):
                low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
                if low < high:
                    covered += high - low
                    offset = piece.offset + 4 * (low - piece.start)
                    wanted[piece.file].append((offset, 4 * (high - low), target[low - start : high - start]))
            if covered != length:
                raise CheckpointIncompatible(
                    f"{self._store.uri}: {kind} of {parameter} covers {covered} of {length} elements "
                    f"from {start}, which this model needs; resume with the model that wrote it"
                )
        return {file: sorted(found, key=lambda item: item[0]) for file, found in wanted.items()}

    def fetch(self, file: str, ranges: list[Range]) -> None:
        """Fill the targets of `ranges`, which are in the order of the file."""
        for group in _requests(ranges):
            first = group[0][0]
            data = self._store.get_range(file, first, group[-1][0] + group[-1][1] - first)
            for offset, size, target in group:
                copy_values(data, offset - first, size, target)


def _requests(ranges: list[Range]) -> Iterator[list[Range]]:
    """What is fetched together: ranges that lie close, up to `_LARGEST_READ`; longer ones are cut."""
    group: list[Range] = []
    for start, length, whole in ranges:
        for at in range(0, length, _LARGEST_READ):
            offset, size = start + at, min(_LARGEST_READ, length - at)
            if group:
                far = offset - (group[-1][0] + group[-1][1]) > _MERGE_GAP
                if far or offset + size - group[0][0] > _LARGEST_READ:
                    yield group
                    group = []
            group.append((offset, size, whole[at // 4 : (at + size) // 4]))
    if group:
        yield group


def copy_values(data: bytes, offset: int, size: int, target: torch.Tensor) -> None:
    """The fp32 values in `size` bytes of `data` from `offset` on, into a flat tensor."""
    values = np.frombuffer(data, dtype="<f4", count=size // 4, offset=offset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the bytes cannot be written to: nobody does
        target.copy_(torch.from_numpy(values))


def open_fragments(run: ObjectStore, step: int) -> FragmentReader:
    """What the checkpoint of `step` holds; raises as `open_checkpoint`."""
    return FragmentReader(*open_checkpoint(run, step))
