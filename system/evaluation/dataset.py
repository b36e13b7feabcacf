"""A committed data set of ours as images to evaluate on.

Samples with the same original image are one image with several captions, so that a set made from Flickr30k or
COCO has their protocol. Classes come from the caption, from a column of the index or from the metadata.

Shapes: R rows (samples), N images, P captions.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa

from cluster.errors import ConfigError, DataError
from cluster.scratch import scratch_folder
from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import DatasetManifest, load_dataset, load_index
from data_pipeline.records import INDEX_SCHEMA, ShardInfo
from data_pipeline.shards.dataset_reader import DatasetReader
from data_pipeline.store_file import StoreFile
from data_pipeline.upkeep.takedown import load_tombstones
from system.evaluation.data import EvalSet, SetAddress
from system.evaluation.zero_shot import ClassList

META = "meta."
_TOGETHER = 64  # images whose bytes are in memory at once
_READ_AHEAD = 1 << 20


def open_dataset(address: SetAddress, class_names: Sequence[str] | None, class_source: str) -> EvalSet:
    """The data set at `address` without the samples that were taken out of it.

    Raises as `load_dataset`; ConfigError when `label` is no column; DataError when nothing is left, or no
    class is.
    """
    dataset, store = load_dataset(address.uri), open_store(address.uri)
    label = address.label
    columns = ["id", "caption", "key", "sha256"]
    if not label.startswith(META) and label not in INDEX_SCHEMA.names:
        raise ConfigError(
            f"label={label}: a data set has no such column; give caption, meta.NAME or one of "
            f"{', '.join(INDEX_SCHEMA.names)}"
        )
    if not label.startswith(META) and label not in columns:
        columns.append(label)
    table = pa.concat_tables([load_index(store, shard, columns) for shard in dataset.shards])
    kept_R = ~np.isin(table["id"].to_numpy(), load_tombstones(store))
    if not kept_R.any():
        raise DataError(f"{dataset.uri}: every sample was taken out of it; evaluate on another data set")
    place_P = np.flatnonzero(kept_R)
    captions = [text for text, kept in zip(table["caption"].to_pylist(), kept_R, strict=True) if kept]
    first_N, image_P = _distinct(table[address.same_image].take(pa.array(place_P)).to_pylist())
    if label == "caption":
        classes = ClassList.of(class_names or captions, class_source or "captions of the data set")
        label_P = classes.labels(captions).numpy()
    else:
        values = _values(store, dataset, label, table)
        classes, label_P = _classes([values[place] for place in place_P], class_names, class_source, label)
    return EvalSet(
        uri=dataset.uri,
        layout="dataset",
        digest=dataset.digest,
        num_images=len(first_N),
        files=_Reader(dataset, place_P[first_N]),
        captions=tuple(captions),
        image_P=image_P,
        class_names=classes.names,
        class_source=classes.source,
        label_N=label_P[first_N],
    )


def _distinct(keys: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """First position of each distinct key in order of appearance [N], and which of them each key is [P]."""
    number: dict[object, int] = {}
    image_P = np.array([number.setdefault(key, len(number)) for key in keys], np.int64)
    _, first_N = np.unique(image_P, return_index=True)
    return first_N, image_P


def _values(store: ObjectStore, dataset: DatasetManifest, label: str, table: pa.Table) -> list[object]:
    """The label's value in every row, None where there is none."""
    if not label.startswith(META):
        return table[label].to_pylist()
    name = label.removeprefix(META)
    found: list[object] = []
    for shard in dataset.shards:
        found += [meta.get(name) for meta in _metadata(store, dataset.format == "tar", shard)]
    if len(found) != dataset.num_samples:
        raise DataError(f"{dataset.uri}: metadata of {len(found)} samples; run maskclip dataset verify")
    return found


def _metadata(store: ObjectStore, in_tar: bool, shard: ShardInfo) -> Iterator[dict]:
    if not in_tar:
        for text in load_index(store, shard, ["meta"])["meta"].to_pylist():
            yield json.loads(text)
        return
    file = io.BufferedReader(StoreFile(store, shard.name, 0, shard.size), _READ_AHEAD)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".json") else None
            if content is not None:
                yield json.loads(content.read()).get("meta", {})


def _classes(
    values: Sequence[object], names: Sequence[str] | None, source: str, label: str
) -> tuple[ClassList, np.ndarray]:
    """Classes of values that are compared as text; a whole number is the position in given names."""
    texts = [None if value is None else str(value) for value in values]
    if all(text is None for text in texts):
        raise DataError(f"label={label}: no sample has a value there; correct label")
    known = sorted({text for text in texts if text is not None and text.strip()})
    classes = ClassList.of(names or known, source or f"{label} of the data set")
    if names is not None and all(isinstance(value, int) for value in values if value is not None):
        index = {str(number): number for number in range(len(classes.names))}
    else:
        index = classes.index
    return classes, np.array([-1 if text is None else classes.find(text, index) for text in texts], np.int64)


class _Reader:
    """The images at these places of a data set; shards of a remote one pass through a temporary folder."""

    def __init__(self, dataset: DatasetManifest, place_N: np.ndarray) -> None:
        self._dataset, self._place_N = dataset, place_N
        self._starts = np.cumsum([0, *(shard.num_samples for shard in dataset.shards)])

    def __call__(self, positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        largest = max(
            sum(self._dataset.files[name].size for name in {shard.name, shard.index_name})
            for shard in self._dataset.shards
        )
        with scratch_folder() as folder:
            reader = DatasetReader(self._dataset, str(folder), 2 * largest)
            try:
                places = iter(self._place_N[np.asarray(positions, np.int64)].tolist())
                while some := list(islice(places, _TOGETHER)):
                    yield from self._read(reader, np.array(some))
            finally:
                reader.close()

    def _read(self, reader: DatasetReader, place_n: np.ndarray) -> list[tuple[str, bytes]]:
        shard_n = np.searchsorted(self._starts, place_n, side="right") - 1
        found: list[tuple[str, bytes]] = [("", b"")] * len(place_n)
        for number, sample in reader.samples(shard_n, place_n - self._starts[shard_n]):
            found[number] = (sample.key, bytes(sample.image))
        return found
