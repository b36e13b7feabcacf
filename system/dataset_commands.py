"""What `maskclip dataset ...` does. As in `commands`, each imports what it needs when it runs.

The settings of these commands are plain text, `key=value`, and not read as YAML as in recipes: an address, an
id or a hash that happens to look like a number must stay what it is.
"""

import re
import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from cluster.errors import ConfigError, DataError
from system.commands import Args, Result, Rows, cell, verdict
from system.console import progress_bar

_KNOB = re.compile(r"[a-z_]\w*=")
_SHOWN = 20

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    output: str = ""
    """Local folder for stats.json and stats.png; empty: only the table."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    workers: int = 4
    """Files that are read at a time."""

    def __post_init__(self) -> None:
        _require(self.workers >= 1, f"workers is {self.workers}: set it to 1 or more")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    output: str
    """Folder of the new data set."""
    workers: int = 4
    """Files that are copied at a time."""

    def __post_init__(self) -> None:
        _require(bool(self.output), "output is empty: set it to the folder of the new data set")
        _require(self.workers >= 1, f"workers is {self.workers}: set it to 1 or more")


@dataclass(frozen=True, kw_only=True)
class RemoveConfig:
    by: Literal["url", "sha256", "id", "source"]
    """What the values are; sha256 is that of the original image."""
    values: str = ""
    """Values with commas between them; for values that hold commas use list."""
    list: str = ""
    """Local text file with one value per line."""
    reason: str = ""
    """Stands in the tombstone."""
    missing: Literal["error", "ok"] = "error"
    """What a value that no row has is. All others are removed either way."""

    def __post_init__(self) -> None:
        _require(bool(self.values) != bool(self.list), "give either values=a,b or list=FILE")


def dataset_verify(args: Args) -> Result:
    from cluster.store import open_store
    from data_pipeline.catalog import verify_dataset
    from data_pipeline.upkeep.takedown import tombstone_problems

    problems = {args.dataset: verify_dataset(args.dataset) + tombstone_problems(open_store(args.dataset))}
    return verdict(problems, args.dataset, "data set", DataError.exit_code)


def dataset_audit(args: Args) -> Result:
    from data_pipeline.upkeep.audit_job import audit

    config = text_knobs(args.knobs, AuditConfig, "dataset audit")
    with progress_bar("audit") as bar:
        found = audit(args.dataset, config.workers, bar)
    status = "whole" if found.whole else ("damaged" if found.problems else "not committed")
    data = {"status": status, **asdict(found)}
    rows = [
        ("status", status),
        ("manifest", found.digest or "none yet"),
        ("rows in", f"{found.rows_in:,}"),
        ("= kept", f"{found.kept:,}" + (f" ({found.removed:,} removed)" if found.removed else "")),
        ("+ dropped", f"{found.dropped:,}" + _listed(found.reasons)),
        ("+ pending", f"{found.pending:,}"),
        ("dropped but retriable", f"{found.retriable:,}"),
        ("chunks", f"{found.chunks:,}" + _pending_chunks(found.pending_chunks)),
        ("shards", f"{found.shards:,}" + (f" of format {found.format}" if found.format else "")),
        ("files", f"{found.files:,} ({found.bytes:,} bytes)"),
        ("orphans", _first(found.orphans)),
        *(("problem", line) for line in found.problems),
    ]
    table = Rows(f"audit of {args.dataset}", ("what", "found"), rows).table()
    return Result(data, table, 0 if found.whole else DataError.exit_code)


def dataset_stats(args: Args) -> Result:
    from data_pipeline.upkeep.stats import ASPECT_UNIT, write_stats
    from data_pipeline.upkeep.stats import dataset_stats as stats_of

    config = text_knobs(args.knobs, StatsConfig, "dataset stats")
    with progress_bar("stats") as bar:
        stats, histograms = stats_of(args.dataset, bar)
    ratios = {key: value / ASPECT_UNIT for key, value in stats["aspect"].items()}
    rows = [(key, _stat(value)) for key, value in {**stats, "aspect": ratios}.items()]
    if config.output:
        paths = [str(path) for path in write_stats(stats, histograms, Path(config.output))]
        rows.append(("written", "\n".join(paths)))
        stats = {**stats, "written": paths}
    return Result(stats, Rows(f"data set {args.dataset}", ("what", "value"), rows).table())


def dataset_remove(args: Args) -> Result:
    from data_pipeline.upkeep.takedown import remove_samples

    config = text_knobs(args.knobs, RemoveConfig, "dataset remove")
    values = _lines(config.list) if config.list else config.values.split(",")
    with progress_bar("searched") as bar:
        done = remove_samples(
            args.dataset, config.by, values, reason=config.reason, now=utc_now, progress=bar
        )
    failed = bool(done.not_found) and config.missing == "error"
    rows = [
        ("asked for", f"{done.asked:,} by {done.by}"),
        ("removed now", f"{done.removed:,}"),
        ("  of them twins of duplicates", f"{done.twins:,}"),
        *(("  of them only alike", source) for source in done.near_twins[:_SHOWN]),
        ("removed before", f"{done.already_removed:,}"),
        ("rows that were no sample", f"{done.dropped:,}"),
        ("removed in all", f"{done.removed_in_all:,}"),
        ("tombstone", done.tombstone or "none: nothing was left to remove"),
        *(("not found", value) for value in done.not_found[:_SHOWN]),
    ]
    if more := len(done.not_found) - _SHOWN:
        rows += [("not found", f"{more:,} more")] if more > 0 else []
    table = Rows(f"removed from {args.dataset}", ("what", "value"), rows).table()
    return Result(asdict(done), table, DataError.exit_code if failed else 0)


def dataset_merge(args: Args) -> Result:
    from data_pipeline.upkeep.merge import merge_datasets

    # The number of data sets is open, so the parser cannot tell them from the settings.
    knobs = [word for word in args.words if _KNOB.match(word)]
    config = text_knobs(knobs, MergeConfig, "dataset merge")
    with progress_bar("copied") as bar:
        done = merge_datasets(
            [word for word in args.words if word not in knobs], config.output, config.workers, bar
        )
    rows = list(asdict(done).items())
    return Result(asdict(done), Rows(f"data set {config.output}", ("what", "value"), rows).table())


def dataset_diff(args: Args) -> Result:
    from data_pipeline.upkeep.diff import diff_datasets

    with progress_bar("compared") as bar:
        data = diff_datasets(args.a, args.b, bar)
    rows: list[tuple[str, Any]] = [("in both, the same", f"{data['same']:,}")]
    for name, title in (("changed", "changed"), ("only_a", "only in A"), ("only_b", "only in B")):
        rows.append((title, f"{data[name]['count']:,}"))
        rows += [("", _example(example)) for example in data[name]["examples"]]
    for part in ("recipe", "counts"):
        rows += [(f"{part} {key}", f"{a} | {b}") for key, (a, b) in data[part].items()]
    return Result(data, Rows(f"A {args.a}\nB {args.b}", ("what", "found"), rows).table())


def text_knobs(words: Iterable[str], kind: type[T], where: str) -> T:
    """The settings `words` of the command `where` as a `kind`, a flat dataclass of texts, whole numbers and
    choices.

    Raises ConfigError for an unknown, missing, repeated or impossible setting.
    """
    types, values = typing.get_type_hints(kind), {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ConfigError(f"{where}: {word!r} is not of the form key=value; correct it")
        if key not in types:
            known = ", ".join(types) or "none"
            raise ConfigError(f"{where}: {key}: unknown key; the keys are: {known}")
        if key in values:
            raise ConfigError(f"{where}: {key} is given twice; give it once")
        values[key] = _convert(where, key, value, types[key])
    for field in fields(kind):  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        if field.name not in values and field.default is MISSING:
            raise ConfigError(f"{where}: {field.name}: missing, give {field.name}=...")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def utc_now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _convert(where: str, key: str, value: str, kind: Any) -> Any:
    if kind is int:
        if not re.fullmatch(r"-?\d+", value):
            raise ConfigError(f"{where}: {key}: {value!r} is no whole number; correct {key}")
        return int(value)
    choices = typing.get_args(kind)
    if choices and value not in choices:
        raise ConfigError(f"{where}: {key}: {value!r} is none of {', '.join(choices)}; correct {key}")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the values ({reason}); correct list") from None


def _listed(reasons: dict[str, int]) -> str:
    return "".join(f"\n  {reason} {n:,}" for reason, n in reasons.items())


def _pending_chunks(pending: int | None) -> str:
    if pending is None:
        return " begun; how many there will be is not written yet"
    return f" ({pending:,} pending)" if pending else ""


def _first(names: tuple[str, ...]) -> str:
    more = f"\n{len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return "\n".join(names[:_SHOWN]) + more if names else "none"


def _stat(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "  ".join(f"{key} {_stat(item)}" for key, item in value.items())
    return f"{value:,}" if type(value) is int else cell(value)


def _example(example: dict[str, Any]) -> str:
    """One sample of a difference; what changed is a list of both values."""
    plain = ("id", "source", "caption")
    return "  ".join(
        f"{key} {' -> '.join(map(str, value))}" if isinstance(value, list) else f"{key} {value}"
        for key, value in example.items()
        if isinstance(value, list) or key in plain
    )
