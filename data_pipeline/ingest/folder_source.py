"""Reads folders of loose image, caption and metadata files; the files of a sample stand beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.store import ObjectInfo, ObjectStore
from data_pipeline.ingest.sample_files import READ_EXTENSIONS, SampleFiles, split_name


def cut_folder(objects: Iterable[ObjectInfo], rows_per_chunk: int) -> list[list[ObjectInfo]]:
    """The files of runs of `rows_per_chunk` samples, in order of key; files that belong to none are left
    out."""
    samples: dict[str, list[ObjectInfo]] = {}
    for one in objects:
        split = split_name(one.key)
        if split is not None:
            samples.setdefault(split[0], []).append(one)
    runs = [sorted(samples[key]) for key in sorted(samples)]
    return [
        [one for sample in runs[i : i + rows_per_chunk] for one in sample]
        for i in range(0, len(runs), rows_per_chunk)
    ]


def read_folder(store: ObjectStore, names: Iterable[str]) -> Iterator[SampleFiles]:
    """Yield the samples whose files are `names`, in that order, each read when it is asked for.

    Raises:
        ObjectNotFound: a file is gone since the plan was made.
    """
    files: SampleFiles | None = None
    for name in names:
        split = split_name(name)
        assert split is not None  # the plan has only names of samples
        key, extension = split
        if files is None or key != files.key:
            if files is not None:
                yield files
            files = SampleFiles(key)
        files.extensions.append(extension)
        if extension in READ_EXTENSIONS:
            files.payloads[extension] = store.get(name)
    if files is not None:
        yield files
