"""Class folders and CLIP_benchmark's WebDataset tars as images to evaluate on.

Shapes: N images, P captions.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from cluster.errors import DataError, ObjectNotFound
from cluster.store import ObjectStore
from cluster.store_local import LocalStore
from data_pipeline.ingest.sample_files import split_name
from data_pipeline.store_file import StoreFile
from system.evaluation.data import (
    CLASS_NAMES,
    IMAGE_SUFFIXES,
    EvalSet,
    is_image,
    listing_digest,
    stored_lines,
    stored_templates,
)

_READ_AHEAD = 1 << 18


def open_folder(store: ObjectStore) -> EvalSet:
    """ROOT/<class>/**/<image>; classes are the folders in the order of their names, as in torchvision.

    `_` in a folder's name is a space in the class name. Raises DataError for a folder without images, and
    when there are none at all.
    """
    keys = [(info.key, info.size) for info in store.list("") if "/" in info.key]
    folders = sorted({key.split("/")[0] for key, _ in keys} | _local_folders(store))
    images = sorted(item for item in keys if is_image(item[0]))
    if not images:
        raise DataError(f"{store.uri}: no folders with images; expected {store.uri}/<class>/<image>.jpg")
    number = {folder: k for k, folder in enumerate(folders)}
    label_N = np.array([number[key.split("/")[0]] for key, _ in images], np.int64)
    empty = sorted(set(folders) - {folders[label] for label in label_N})
    if empty:
        raise DataError(f"{store.uri}: no images in the class folder {empty[0]!r}; fill it or remove it")

    def files(positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for position in positions:
            key, _ = images[position]
            yield key, store.get(key)

    return EvalSet(
        uri=store.uri,
        layout="folder",
        digest=listing_digest(images),
        num_images=len(images),
        files=files,
        image_P=np.zeros(0, np.int64),
        class_names=tuple(folder.replace("_", " ") for folder in folders),
        class_source="names of the class folders",
        label_N=label_N,
        templates=stored_templates(store),
    )


def _local_folders(store: ObjectStore) -> set[str]:
    # An empty folder is in no listing of objects, but it is a class that somebody meant.
    if not isinstance(store, LocalStore) or not store.root.is_dir():
        return set()
    return {path.name for path in store.root.iterdir() if path.is_dir() and not path.name.startswith(".")}


@dataclass
class _Entry:
    """One image of a tar."""

    key: str
    tar: str
    offset: int = 0
    size: int = 0
    label: int = -1
    captions: list[str] = field(default_factory=list)


def open_webdataset(store: ObjectStore, split: str) -> EvalSet:
    """CLIP_benchmark's layout: ROOT/<split>/<number>.tar, as many as nshards.txt says or as there are.

    Only the headers of the tars and their small files are read here. Raises DataError for a tar that is none,
    a class number outside classnames.txt, and when there are no images.
    """
    tars = _tars(store, split)
    names = tuple(stored_lines(store, CLASS_NAMES)) if store.exists(CLASS_NAMES) else ()
    sizes = [(tar, store.size(tar)) for tar in tars]
    entries = [entry for tar, size in sizes for entry in _entries(store, tar, size)]
    if not entries:
        raise DataError(f"{store.uri}/{split}: no images in its tars; correct data or split")
    label_N = np.array([entry.label for entry in entries], np.int64)
    if names and (label_N >= len(names)).any():
        wrong = entries[int(np.argmax(label_N))]
        raise DataError(
            f"{store.uri}/{wrong.tar}: {wrong.key}.cls says {wrong.label}, but {CLASS_NAMES} has "
            f"{len(names)} names; it is counted from 0"
        )

    def files(positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for position in positions:
            entry = entries[position]
            yield f"{entry.tar}/{entry.key}", store.get_range(entry.tar, entry.offset, entry.size)

    return EvalSet(
        uri=store.uri,
        layout="webdataset",
        digest=listing_digest(sizes, names, split),
        num_images=len(entries),
        files=files,
        captions=tuple(caption for entry in entries for caption in entry.captions),
        image_P=np.repeat(np.arange(len(entries)), [len(entry.captions) for entry in entries]),
        class_names=names if (label_N >= 0).any() else (),
        class_source=f"{store.uri}/{CLASS_NAMES}",
        label_N=label_N if names else np.full(len(entries), -1, np.int64),
        templates=stored_templates(store),
    )


def _tars(store: ObjectStore, split: str) -> list[str]:
    folder = f"{split}/" if split else ""
    if store.exists(f"{folder}nshards.txt"):
        (text,) = stored_lines(store, f"{folder}nshards.txt")[:1]
        if not text.isdecimal():
            raise DataError(f"{store.uri}/{folder}nshards.txt: {text!r} is no number; write how many tars")
        return [f"{folder}{number}.tar" for number in range(int(text))]
    found = sorted(info.key for info in store.list(folder) if info.key.endswith(".tar"))
    if not found:
        raise ObjectNotFound(f"{store.uri}/{folder}: no tars there; correct data or split")
    return found


def _entries(store: ObjectStore, tar_name: str, size: int) -> Iterator[_Entry]:
    """The images of a tar in its order; files of one key stand together, as WebDataset writes them."""
    entry: _Entry | None = None
    try:
        with _open(store, tar_name, size) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                named = split_name(member.name) if member.isfile() else None
                if named is None:
                    continue
                key, extension = named
                if entry is None or entry.key != key:
                    if entry is not None and entry.size:
                        yield entry
                    entry = _Entry(key, tar_name)
                if f".{extension}" in IMAGE_SUFFIXES:
                    entry.offset, entry.size = member.offset_data, member.size
                elif extension in ("cls", "txt"):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    text = content.read().decode("utf-8")
                    if extension == "cls":
                        entry.label = int(text)
                    else:
                        entry.captions = [line.strip() for line in text.splitlines() if line.strip()]
    except (tarfile.TarError, ValueError) as error:
        where = f" at {entry.key}" if entry is not None else ""
        raise DataError(
            f"{store.uri}/{tar_name}: not CLIP_benchmark's tar{where} ({error}); correct data or layout"
        ) from error
    if entry is not None and entry.size:
        yield entry


def _open(store: ObjectStore, name: str, size: int) -> BinaryIO | io.BufferedReader:
    if isinstance(store, LocalStore):
        return (store.root / name).open("rb")
    return io.BufferedReader(StoreFile(store, name, 0, size), _READ_AHEAD)
