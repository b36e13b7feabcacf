"""The files of one sample in a tar or a folder: which belong together, and what makes them a row.

The layout is img2dataset's: `<key>.jpg|jpeg|png|webp|gif`, `<key>.txt` (the caption) and `<key>.json`
(metadata, optional). A key is a file's path up to the first dot of its name, as in WebDataset; names that
begin with a dot or have none are no samples.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.records import Reject, SourceRow

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")
READ_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "txt", "json"))
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass
class SampleFiles:
    """The files of one key, as they are read."""

    key: str
    extensions: list[str] = field(default_factory=list)
    payloads: dict[str, bytes] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: (key, extension in lower case), or None where the name belongs to no sample."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2].lower()) if found else None


def storable(text: str) -> str:
    """`text` as UTF-8 can hold it: lone surrogates, as of broken file names, are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def key_fault(key: str) -> str | None:
    """Why `key` cannot name the files of a sample, or None if it can."""
    if key != storable(key) or "\0" in key:
        return "not UTF-8, or with a zero byte"
    parts = key.split("/")
    if key.startswith("/") or ".." in parts or not all(parts):
        return "absolute, with a .. in it, or with an empty part"
    return None


def to_row(files: SampleFiles, chunk: int, row: int, source: str) -> SourceRow | Reject:
    """Row number `row` of the chunk, whose source is `source`; a `Reject` where it is not one sample."""
    key, source = storable(files.key), storable(source)
    url = None

    def reject(reason: str, detail: str) -> Reject:
        return Reject(chunk, row, key, source, reason, detail, url=url)

    fault = key_fault(files.key)
    if fault is not None:
        return reject("unsafe_key", fault)
    try:
        meta = _parse_meta(files.payloads.get("json", b"{}"))
    except ValueError as error:
        return reject("bad_metadata", str(error))
    url = meta_url(meta)
    images = [e for e in files.extensions if e in IMAGE_EXTENSIONS]
    captions = files.extensions.count("txt")  # a folder may hold both a.txt and a.TXT
    found = f"has {', '.join(storable(e) for e in files.extensions)}"
    if len(images) != 1:
        return reject("several_images" if images else "no_image", found)
    if captions != 1:
        return reject("several_captions" if captions else "no_caption", found)
    try:
        caption = files.payloads["txt"].decode()
    except UnicodeDecodeError as error:
        return reject("bad_caption", str(error))
    return SourceRow(chunk, row, key, source, caption, meta, files.payloads[images[0]], url)


def meta_url(meta: dict[str, Any]) -> str | None:
    """The address that the image came from, where the metadata have it as img2dataset writes it."""
    url = meta.get("url")
    return storable(url) if isinstance(url, str) and url.strip() else None


def _parse_meta(data: bytes) -> dict[str, Any]:
    # NaN and Infinity are not JSON, though Python writes them; they become null.
    try:
        meta = json.loads(data, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(meta, dict):
        raise ValueError(f"a JSON object is wanted, not {type(meta).__name__}")
    return meta
