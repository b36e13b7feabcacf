"""Random access to the samples of committed shards: a row of the index, a read of the tar, a checksum."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from cluster.errors import ConfigError, ObjectNotFound, ShardCorrupt, StorageUnavailable
from cluster.manifest import sha256_file
from cluster.store import open_store
from cluster.store_local import LocalStore
from data_pipeline.catalog import DatasetManifest, read_index
from data_pipeline.shard_cache import ShardCache

OPEN_SHARDS = 256  # two descriptors each; the usual limit of a process is 1024
OPEN_ATTEMPTS = 5


class StoredSample(NamedTuple):
    """One sample as it is stored; `image` is the encoded file."""

    id: int
    key: str
    caption: str
    image: bytes
    width: int
    height: int
    source: str


class ShardReader:
    """One shard: the index mapped into memory, the tar read in place. `close` frees the tar's descriptor.

    Raises FileNotFoundError when a file is absent, ShardCorrupt when the index cannot be read.
    """

    def __init__(self, tar_path: Path, index_path: Path) -> None:
        self._name = str(tar_path)
        with open(index_path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
                raise ShardCorrupt(f"{index_path}: the index is empty; copy the shard again")
        with pa.memory_map(str(index_path)) as mapped:
            table = read_index(mapped.read_buffer(), str(index_path)).combine_chunks()
        self._rows = table.num_rows
        self._numbers = {
            name: table[name].to_numpy()
            for name in ("id", "width", "height", "image_offset", "image_size", "image_crc32")
        }
        self._texts = {name: table[name] for name in ("key", "caption", "source")}
        self._descriptor = os.open(tar_path, os.O_RDONLY | os.O_CLOEXEC)

    def __len__(self) -> int:
        return self._rows

    def close(self) -> None:
        """Close the tar; the reader cannot be used afterwards."""
        os.close(self._descriptor)

    def sample(self, index: int) -> StoredSample:
        """The sample in row `index`.

        Raises:
            IndexError: there is no such row.
            ShardCorrupt: the image's bytes are not those that were written; names the shard and the key.
        """
        if not 0 <= index < self._rows:
            raise IndexError(f"{self._name}: no row {index}, the shard has {self._rows}")
        number = {name: int(column[index]) for name, column in self._numbers.items()}
        text = {name: column[index].as_py() for name, column in self._texts.items()}
        offset, size = number["image_offset"], number["image_size"]
        image = os.pread(self._descriptor, size, offset)
        if len(image) != size or zlib.crc32(image) != number["image_crc32"]:
            what = (
                f"ends after {len(image)} of {size} bytes" if len(image) != size else "has a wrong checksum"
            )
            raise ShardCorrupt(
                f"{self._name}: the image of sample {text['key']!r} at byte {offset} {what}; "
                "restore the shard or preprocess again"
            )
        return StoredSample(
            number["id"],
            text["key"],
            text["caption"],
            image,
            number["width"],
            number["height"],
            text["source"],
        )


class DatasetReader:
    """Any sample of a data set by (shard, index in shard). Keeps the shards used last open.

    A data set in a local folder is read where it is: the size of a tar and the sha256 of an index are checked
    when a shard is first opened, the checksum of an image at each read. Shards of a remote one are copied
    into the folder `cache`, which may be shared by the processes of a node and holds at most `cache_bytes`.

    Raises ConfigError when the data set is remote and there is no cache folder, or it cannot hold one shard.
    """

    def __init__(self, dataset: DatasetManifest, cache: str | None, cache_bytes: int) -> None:
        self._dataset = dataset
        self._store = open_store(dataset.uri)
        self._cache: ShardCache | None = None
        if not isinstance(self._store, LocalStore):
            if cache is None:
                raise ConfigError(
                    f"{dataset.uri}: shards of a remote data set need a local folder: set data.loader.cache"
                )
            self._cache = ShardCache(self._store, dataset, Path(cache), cache_bytes)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._checked: set[int] = set()

    def get(self, shard: int, index: int) -> StoredSample:
        """One sample.

        Raises:
            ShardCorrupt: the shard or the sample is not what was committed.
            ObjectNotFound: a file of the data set is gone.
            StorageUnavailable: the store did not answer.
        """
        try:
            return self._reader(shard).sample(index)
        except ShardCorrupt:
            if self._cache is None:
                raise
            # A copy that went bad, here or on the way, says nothing about the data set: copy it once more.
            self._forget(shard)
            self._cache.discard(shard)
            return self._reader(shard).sample(index)

    def close(self) -> None:
        """Close every open shard."""
        for shard in list(self._open):
            self._forget(shard)

    def _reader(self, shard: int) -> ShardReader:
        reader = self._open.get(shard)
        if reader is None:
            reader = self._open[shard] = self._opened(shard)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return reader

    def _opened(self, shard: int) -> ShardReader:
        info = self._dataset.shards[shard]
        if isinstance(self._store, LocalStore):
            tar, index = self._store.root / info.name, self._store.root / info.index_name
            try:
                return self._checked_reader(shard, tar, index)
            except FileNotFoundError as error:
                raise ObjectNotFound(
                    f"{error.filename}: no such file, but the manifest lists it; restore it"
                ) from None
        assert self._cache is not None
        for _ in range(OPEN_ATTEMPTS):
            try:
                return self._checked_reader(shard, *self._cache.paths(shard))
            except FileNotFoundError:
                continue  # another process evicted it between the copy and the opening
        raise StorageUnavailable(
            f"{self._cache.folder}: {info.name} was evicted {OPEN_ATTEMPTS} times before it could be opened; "
            "raise data.loader.cache_bytes"
        )

    def _checked_reader(self, shard: int, tar: Path, index: Path) -> ShardReader:
        if shard not in self._checked:
            info = self._dataset.shards[shard]
            if (size := tar.stat().st_size) != info.size:
                raise ShardCorrupt(
                    f"{tar}: {size} bytes, but the manifest says {info.size}; "
                    "restore the shard or preprocess again"
                )
            if sha256_file(index) != self._dataset.files[info.index_name].sha256:
                raise ShardCorrupt(
                    f"{index}: sha256 is not the manifest's; restore the index or preprocess again"
                )
            self._checked.add(shard)
        return ShardReader(tar, index)

    def _forget(self, shard: int) -> None:
        self._checked.discard(shard)
        if (reader := self._open.pop(shard, None)) is not None:
            reader.close()
