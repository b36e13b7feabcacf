"""What the commands do: each takes the parsed arguments and returns a `Result`, or raises an error of
cluster.errors. Those of checkpoints and data sets are in `checkpoint_commands` and
`dataset_commands`.

Every command imports what it needs when it runs: `maskclip --help` or `config` shall not wait for torch.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError, DataError
from cluster.store import open_store
from system.console import progress_bar

if TYPE_CHECKING:
    from system.config import TrainConfig

Args = argparse.Namespace
HANDED_OVER = "MASKCLIP_CONFIG"
"""Name in the environment of the ranks: the resolved training configuration, as JSON."""


@dataclass(frozen=True)
class Result:
    """What a command found: `data` for machines, `text` (anything that rich prints) for people."""

    data: Any
    text: Any
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    output: str = "report.html"
    """Where the HTML page goes."""
    compare: str | None = None
    """Another run to show beside it: local path or s3://bucket/prefix."""


@dataclass
class Rows:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple] = field(default_factory=list)

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            table.add_row(*map(cell, row))
        return table


def cell(value: Any) -> str:
    """A value as a table shows it: numbers to four digits, collections in words."""
    if value is None or value == {} or value == () or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return "  ".join(f"{key} {cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value)


def show(result: Result, as_json: bool) -> None:
    # No markup: a path may well hold square brackets.
    console = Console(highlight=False, markup=False, soft_wrap=as_json or isinstance(result.text, str))
    if as_json:
        console.print_json(data=result.data)
    else:
        console.print(result.text)


def knobs(args: Args, kind: type) -> Any:
    """The `key=value` settings of a command that has no recipe, as a typed config."""
    from system.recipe import apply_overrides, validate

    return validate(kind, apply_overrides({}, args.knobs), args.command, recipe=False)


def preprocess(args: Args) -> Result:
    from data_pipeline.job.preprocess import PreprocessConfig, run_preprocess
    from system.recipe import load_recipe

    config = load_recipe(args.recipe, args.knobs, PreprocessConfig)
    with progress_bar("preprocess") as bar:
        summary = asdict(
            run_preprocess(config, lambda state: bar(state["done"], state["total"], preprocess_note(state)))
        )
    rows = [(key, value) for key, value in summary.items()]
    if summary["retriable"]:
        rows.append(("note", f"{summary['retriable']:,} rows were lost for what may pass"))
    return Result(
        {"output": config.output, **summary},
        Rows(f"data set {config.output}", ("what", "value"), rows).table(),
    )


def preprocess_note(state: dict[str, Any]) -> str:
    """What stands beside the bar of a preprocess job: stage, fates of the rows, rate, time left."""
    parts = [state["stage"], f"{state['rows']:,} rows"]
    if state["dropped"]:
        parts.append(f"{state['dropped']:,} dropped ({state['dropped'] / max(state['rows'], 1):.1%})")
    if state["skipped"]:
        parts.append(f"{state['skipped']:,} done earlier")
    if state["rows_per_second"]:
        parts.append(f"{state['rows_per_second']:,.0f} rows/s")
    if state["seconds_left"]:
        parts.append(f"{duration(state['seconds_left'])} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:03", "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def train_config(recipe: str, overrides: list[str]) -> "TrainConfig":
    """From the recipe; in a rank that our launcher started, the very one that the launcher has checked."""
    from system.config import TrainConfig, load_train_recipe
    from system.recipe import validate

    handed_over = os.environ.get(HANDED_OVER)
    if handed_over is not None and "RANK" in os.environ:
        return validate(TrainConfig, json.loads(handed_over), HANDED_OVER)
    return load_train_recipe(recipe, overrides)


def evaluate(args: Args) -> Result:
    from system.evaluation.evaluate import EvaluateConfig, evaluations
    from system.evaluation.view import render as view
    from system.evaluation.view import render_several

    config = knobs(args, EvaluateConfig)
    with progress_bar("encoded") as bar:
        results = list(
            evaluations(args.run, config, lambda state: bar(state["done"], state["total"], state["stage"]))
        )
    data: Any = {"run": args.run, "results": results} if config.several else results[0]
    text = render_several(results) if config.several else view(results[0])
    if config.output is not None:
        from system.evaluation.figures import write_scores

        data["written"] = write_scores(results, Path(config.output))
    return Result(data, text)


def export(args: Args) -> Result:
    from system.export.export import ExportConfig
    from system.export.export import export as run_export

    result = run_export(args.run, knobs(args, ExportConfig))
    return Result(result, Rows("export", ("what", "value"), list(result.items())).table())


def report(args: Args) -> Result:
    from system.report.report import summary, write_report
    from system.report.story import load_run

    config = knobs(args, ReportConfig)
    record = load_run(open_store(args.run))
    other = load_run(open_store(config.compare)) if config.compare else None
    return Result(write_report(record, Path(config.output), other), summary(record, other))


def dashboard(args: Args) -> Result:
    from system.dashboard.serve import DashboardConfig, serve

    config = knobs(args, DashboardConfig)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    serve(args.uri, config, lambda address: console.print(f"{args.uri} at {address}  (Ctrl-C ends it)"))
    return Result({"uri": args.uri}, f"{args.uri}: the dashboard has ended")


def show_config(args: Args) -> Result:
    import yaml

    from system.config import load_train_recipe, to_dict
    from system.recipe import load_recipe, read_recipe

    command = read_recipe(args.recipe).get("command", "train")
    if command == "train":
        config: Any = load_train_recipe(args.recipe, args.knobs)
    elif command == "preprocess":
        from data_pipeline.job.preprocess import PreprocessConfig

        config = load_recipe(args.recipe, args.knobs, PreprocessConfig)
    else:
        raise ConfigError(
            f"{args.recipe}: command {command!r} is none of train, preprocess; correct `command`"
        )
    values = to_dict(config)
    return Result(values, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())


def doctor(args: Args) -> Result:
    if args.cluster:
        from system.cluster_doctor import run_cluster_checks as run_checks
    else:
        from system.doctor import run_checks

    checks = run_checks(args.uri)
    failed = [check for check in checks if check.status == "fail"]
    code = (failed[0].exit_code or ConfigError.exit_code) if failed else 0
    rows = [(c.name, c.status, c.detail, c.fix) for c in checks]
    table = Rows("doctor", ("check", "status", "found", "what to do"), rows).table()
    return Result([asdict(check) for check in checks], table, code)


def demo(args: Args) -> Result:
    from system.demo import run_demo

    data = run_demo(Path(args.folder))
    return Result(data, Rows("demo", ("what", "value"), list(data.items())).table())


def verdict(problems: dict[str, list[str]], where: str, what: str, bad: int) -> Result:
    """The result of a check of several things, each with its lines of problems."""
    if not problems:
        raise DataError(f"{where}: no committed {what} here; correct the URI")
    found = [line for lines in problems.values() for line in lines]
    status: Literal["whole", "damaged"] = "damaged" if found else "whole"
    text = "\n".join(found) if found else f"{where}: {len(problems)} {what}(s) whole"
    return Result({"status": status, "checked": list(problems), "problems": found}, text, bad if found else 0)
