"""Which rows are kept: by caption, address and metadata before the download, by header and bytes after it.

Everything is off but the two limits against bombs. A row that is dropped keeps its reason, one of `REASONS`.
None of this is from the paper.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ConfigError
from data_pipeline.ingest.captions import check_languages, detect_language, repeated_runs, word_share
from data_pipeline.ingest.sources import SourceConfig
from data_pipeline.job.lists import HashList, ListConfig, ListKind, load_list
from data_pipeline.records import Reject, SourceRow

if TYPE_CHECKING:
    from data_pipeline.image.header import ImageHeader

REASONS = {
    "caption_too_short": "fewer than filters.caption_min_chars or filters.caption_min_words",
    "caption_too_long": "more than filters.caption_max_chars",
    "repetitive_caption": "more than filters.max_word_share or filters.max_repeated_runs",
    "wrong_language": "in none of filters.caption_languages",
    "metadata_missing": "a field of filters.metadata is absent or no number",
    "metadata_refused": "a field of filters.metadata is out of its range, or none of its values",
    "not_allowed": "in a list of filters.allow there is no entry for it",
    "denied": "in a list of filters.deny",
    "too_many_bytes": "more than filters.max_bytes",
    "too_many_pixels": "the header claims more than filters.max_pixels",
    "too_small": "less than filters.min_side or filters.min_pixels",
    "side_too_long": "more than filters.max_side",
    "too_elongated": "more than filters.max_aspect",
}
"""Every reason that this module gives, and what it means."""

_WORDS_JUDGED = 6  # in shorter captions a word that stands twice means nothing
_ROW_KINDS: tuple[ListKind, ...] = ("urls", "domains", "keys")


@dataclass(frozen=True, kw_only=True)
class MetadataRule:
    """What a field of the metadata must be. Numbers in text count as numbers."""

    min: float | None = None
    max: float | None = None
    values: tuple[str, ...] | None = None
    """The field, as text, is one of these."""
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of a row where the field is absent, null, NaN, empty or, for min and max, no number."""

    def __post_init__(self) -> None:
        if (self.min, self.max, self.values) == (None, None, None):
            raise ValueError("a rule of filters.metadata tests nothing: set its min, max or values")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}: change filters.metadata")

    def test(self, value: Any) -> str | None:
        """ "missing", or what is wrong with `value`, or None."""
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return "missing"
        if self.values is not None and str(value) not in self.values:
            return f"{str(value)[:80]!r}"
        if self.min is None and self.max is None:
            return None
        number = _number(value)
        if number is None:
            return "missing"
        if self.min is not None and number < self.min:
            return f"{number:g} is below {self.min:g}"
        return f"{number:g} is above {self.max:g}" if self.max is not None and number > self.max else None


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Limits on rows and images; null or empty is off. A row at a limit is kept."""

    min_side: int | None = None
    """Pixels of the shorter side."""
    max_side: int | None = None
    """Pixels of the longer side."""
    max_aspect: float | None = None
    """Longer side over shorter side."""
    min_pixels: int | None = None
    """Width times height."""
    max_pixels: int = 50_000_000
    """Width times height, by the header, before anything is decoded: the limit against bombs."""
    max_bytes: int = 50_000_000
    """Of the image as it came."""
    caption_min_chars: int | None = None
    caption_min_words: int | None = None
    """Words stand between white space, so this is not for Chinese, Japanese or Thai."""
    caption_max_chars: int | None = None
    caption_languages: tuple[str, ...] = ()
    """ISO 639-1 codes such as en; of languages that are close (da, no, sv) list all or lose some."""
    language_confidence: float = 0.2
    """Probability from which the detector counts as sure; captions of two words hardly reach it."""
    language_unsure: Literal["keep", "drop"] = "keep"
    """What becomes of captions about which it is not sure."""
    max_word_share: float | None = None
    """Share of the most frequent word, in captions of 6 words or more."""
    max_repeated_runs: float | None = None
    """Share of the runs of 3 words that stood before in the caption, in captions of 6 words or more."""
    metadata: Mapping[str, MetadataRule] = field(default_factory=dict)
    """Rules by name of the field, for example similarity: {min: 0.28}. A table gives the fields of
    source.table.meta_columns."""
    allow: ListConfig = field(default_factory=ListConfig)
    """Where a kind of list has files, only rows with an entry there are kept."""
    deny: ListConfig = field(default_factory=ListConfig)
    """Rows with an entry in any of these lists are dropped."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"filters.{one.name} is {value}: set it above 0, or to null")
        for name in ("language_confidence", "max_word_share", "max_repeated_runs"):
            value = getattr(self, name)
            if value is not None and value > 1:
                raise ValueError(f"filters.{name} is {value}: it is a share, set it to 1 or less")
        for low, high in (
            ("min_side", "max_side"),
            ("min_pixels", "max_pixels"),
            ("caption_min_chars", "caption_max_chars"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(
                    f"filters.{low} {least} is above filters.{high} {most}: no row would be kept"
                )
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"filters.max_aspect is {self.max_aspect}: it is longer over shorter, 1 or more")


class RowFilter:
    """Tests rows before their download. Lists are loaded once per process, however many filters there are.

    Raises ConfigError for a list that is not there and a language that the detector does not know; DataError
    for a list that cannot be read. So build one before the work starts.
    """

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        check_languages(config.caption_languages)
        # Read anew for each filter, so that a list that grew is noticed; check_header takes what is there.
        self._allow, self._deny = (_load(lists) for lists in (config.allow, config.deny))

    def __call__(self, row: SourceRow) -> Reject | None:
        """Why `row` is dropped, or None."""
        found = self._caption(row.caption) or self._metadata(row.meta) or self._lists(row)
        return Reject.of(row, *found) if found else None

    def _caption(self, caption: str) -> tuple[str, str] | None:
        config = self._config
        words = caption.split()
        length = len(" ".join(words))
        if config.caption_min_chars is not None and length < config.caption_min_chars:
            return "caption_too_short", f"{length} characters, fewer than {config.caption_min_chars}"
        if config.caption_min_words is not None and len(words) < config.caption_min_words:
            return "caption_too_short", f"{len(words)} words, fewer than {config.caption_min_words}"
        if config.caption_max_chars is not None and length > config.caption_max_chars:
            return "caption_too_long", f"{length} characters, more than {config.caption_max_chars}"
        if len(words) >= _WORDS_JUDGED:
            if config.max_word_share is not None and (share := word_share(words)) > config.max_word_share:
                return (
                    "repetitive_caption",
                    f"one word is {share:.2f} of all, more than {config.max_word_share}",
                )
            if (most := config.max_repeated_runs) is not None and (share := repeated_runs(words)) > most:
                return "repetitive_caption", f"{share:.2f} of the runs of words repeat, more than {most}"
        return self._language(caption) if config.caption_languages else None

    def _language(self, caption: str) -> tuple[str, str] | None:
        config = self._config
        language, probability = detect_language(caption)
        if probability < config.language_confidence:
            return None if config.language_unsure == "keep" else ("wrong_language", "not sure which")
        return None if language in config.caption_languages else ("wrong_language", language)

    def _metadata(self, meta: Mapping[str, Any]) -> tuple[str, str] | None:
        for name, rule in self._config.metadata.items():
            fault = rule.test(meta.get(name))
            if fault == "missing":
                if rule.missing == "drop":
                    return "metadata_missing", name
            elif fault is not None:
                return "metadata_refused", f"{name}: {fault}"
        return None

    def _lists(self, row: SourceRow) -> tuple[str, str] | None:
        for kind in _ROW_KINDS:
            entry = row.key if kind == "keys" else row.url or ""
            found = _listed(self._allow, self._deny, kind, entry)
            if found:
                return found
        return None


def check_header(row: SourceRow, header: ImageHeader, config: FilterConfig) -> Reject | None:
    """Why the image of `row`, whose bytes are there, is dropped by its bytes and their header, or None."""
    assert row.image is not None  # the caller has read the header from it
    width, height = header.width, header.height
    short, long, pixels = min(width, height), max(width, height), width * height
    size = f"{width} x {height}"
    if len(row.image) > config.max_bytes:
        return Reject.of(row, "too_many_bytes", f"{len(row.image)} bytes, more than {config.max_bytes}")
    if pixels > config.max_pixels:
        return Reject.of(row, "too_many_pixels", f"{size}, more than {config.max_pixels}")
    if config.min_side is not None and short < config.min_side:
        return Reject.of(row, "too_small", f"{size}, a side is below {config.min_side}")
    if config.min_pixels is not None and pixels < config.min_pixels:
        return Reject.of(row, "too_small", f"{size}, fewer than {config.min_pixels} pixels")
    if config.max_side is not None and long > config.max_side:
        return Reject.of(row, "side_too_long", f"{size}, a side is above {config.max_side}")
    if config.max_aspect is not None and long > config.max_aspect * short:
        return Reject.of(row, "too_elongated", f"{size}, more than {config.max_aspect:g} to 1")
    if config.allow.sha256 or config.deny.sha256:
        entry = hashlib.sha256(row.image).hexdigest()
        allow, deny = (_LOADED[one] if one in _LOADED else _load(one) for one in (config.allow, config.deny))
        found = _listed(allow, deny, "sha256", entry)
        if found:
            return Reject.of(row, *found)
    return None


def check_columns(source: SourceConfig, filters: FilterConfig) -> None:
    """Raise ConfigError where a metadata rule tests what the table does not give: it would drop every row."""
    if source.table is None or source.table.meta_columns == "all":
        return
    absent = [name for name in filters.metadata if name not in source.table.meta_columns]
    if absent:
        raise ConfigError(
            f"filters.metadata tests {', '.join(absent)}, which rows do not carry: "
            "add it to source.table.meta_columns"
        )


def _number(value: Any) -> float | None:
    if not isinstance(value, bool | int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


_Lists = dict[ListKind, HashList]
_LOADED: dict[ListConfig, _Lists] = {}


def _load(lists: ListConfig) -> _Lists:
    uris: dict[ListKind, tuple[str, ...]] = {}
    for kind, uri in lists.files():
        uris[kind] = (*uris.get(kind, ()), uri)
    _LOADED[lists] = {kind: load_list(kind, files) for kind, files in uris.items()}
    return _LOADED[lists]


def _listed(allow: _Lists, deny: _Lists, kind: ListKind, entry: str) -> tuple[str, str] | None:
    if kind in deny and deny[kind].has(entry):
        return "denied", kind
    if kind in allow and not allow[kind].has(entry):
        return "not_allowed", kind
    return None
