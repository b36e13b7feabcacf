"""The `maskclip` command. Recipes are positional, knobs are key=value, every command has --json.

Exit codes are those of cluster.errors. A user's mistake is one line on stderr, never a traceback.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from cluster.errors import ConfigError, Hang, MaskClipError, exit_code_of
from cluster.stop import end_at_once, stop_raises
from system import batch_commands, commands, dataset_commands
from system.checkpoints import commands as checkpoint_commands
from system.checkpoints import upkeep as checkpoint_upkeep

Handler = Callable[[argparse.Namespace], Any]
RECIPE = "recipe"
"""In place of a config class: the recipe decides which one it is."""


class _Parser(argparse.ArgumentParser):
    settings = ""
    """Config class ("module:Class") whose fields the help lists; imported when that help is printed."""

    def format_help(self) -> str:
        if not self.settings:
            return super().format_help()
        from system.settings_help import settings_text

        return f"{super().format_help()}\n{settings_text(self.settings)}"

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def train_command(args: argparse.Namespace) -> Any:
    """Under a launcher (RANK is set) be one rank; otherwise start the local ranks and wait for them."""
    if "RANK" not in os.environ:
        with stop_raises("stopped; run the same command to go on") as check_stop:
            from system.train_command import train_locally

            return train_locally(args, check_stop)
    end_at_once()
    config = commands.train_config(args.recipe, args.knobs)
    from system.train import train  # torch and DeepSpeed, for which the other commands do not wait

    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no result of ours
    return train(config)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="maskclip", description="Train MaskCLIP: data, training, evaluation, export, reports."
    )
    parser.add_argument("--version", action="version", version=_version())
    groups = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(
        where: Any,
        name: str,
        handler: Handler,
        summary: str,
        positional: Sequence[tuple[str, str]] = (),
        settings: str = "",
    ) -> argparse.ArgumentParser:
        sub = where.add_parser(name, help=summary, description=summary)
        sub.settings = "" if settings == RECIPE else settings
        for argument, meaning in positional:
            optional = argument.endswith("?")
            sub.add_argument(argument.rstrip("?"), nargs="?" if optional else None, help=meaning)
        knobs = "settings, listed below" if settings else argparse.SUPPRESS  # hidden, so that main names it
        if settings == RECIPE:
            knobs = "those of the recipe's command: see maskclip train --help, maskclip preprocess --help"
        sub.add_argument("knobs", nargs="*", default=[], metavar="key=value", help=knobs)
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        sub.set_defaults(handler=handler, no_settings=not settings)
        return sub

    recipe, run = ("recipe", "path of a YAML recipe"), ("run", "run folder: local path or s3://bucket/prefix")
    command(
        groups,
        "preprocess",
        commands.preprocess,
        "raw image-text tars, folders or tables -> a committed data set",
        [recipe],
        "data_pipeline.job.preprocess:PreprocessConfig",
    )
    command(
        groups,
        "train",
        train_command,
        "train, or go on from the newest checkpoint",
        [recipe],
        "system.config:TrainConfig",
    )
    command(
        groups,
        "evaluate",
        commands.evaluate,
        "retrieval, zero-shot, k-NN, linear probe, patches: a checkpoint, or every=true; data=...",
        [run],
        "system.evaluation.config:EvaluateConfig",
    )
    command(
        groups,
        "export",
        commands.export,
        "inference weights of a run's checkpoint as safetensors; output=FOLDER",
        [run],
        "system.export.config:ExportConfig",
    )
    command(
        groups,
        "report",
        commands.report,
        "self-contained HTML report of a run and a summary",
        [run],
        "system.commands:ReportConfig",
    )
    command(
        groups,
        "dashboard",
        commands.dashboard,
        "live page of a run or of a folder of runs",
        [("uri", "run folder, or a folder of them: local path or s3://bucket/prefix")],
        "system.dashboard.serve:DashboardConfig",
    )
    summary = "print a recipe as it would run, checked"
    command(groups, "config", commands.show_config, summary, [recipe], RECIPE)
    summary = "memory, time, bandwidth and checkpoints of a recipe on other machines"
    command(groups, "plan", batch_commands.plan, summary, [recipe], "system.planning.plan:PlanConfig")
    command(
        groups,
        "simulate",
        batch_commands.simulation,
        "goodput over checkpoint interval and cluster size, from what a run has measured",
        [("run?", "run folder: local path or s3://bucket/prefix; none: give all costs")],
        "system.planning.simulation:SimulateConfig",
    )
    kinds = groups.add_parser("render", help="files for what runs a training or watches it").add_subparsers(
        dest="kind", required=True, metavar="KIND", parser_class=_Parser
    )
    for kind, what in (
        ("slurm", "Slurm script that requeues itself"),
        ("kuberay", "KubeRay RayJob"),
        ("ray-up", "cluster file for `ray up`"),
    ):
        command(kinds, kind, batch_commands.render_job, what, [recipe], "cluster.render:JobConfig")
    folder = ("output", "folder for the files")
    for kind, what in (
        ("prometheus", "scrape configuration, alert rules and Alertmanager"),
        ("grafana", "dashboards and their provisioning"),
    ):
        command(kinds, kind, batch_commands.render_monitoring, what, [folder])
    command(
        groups,
        "doctor",
        commands.doctor,
        "check this machine, and a store if its URI is given",
        [("uri?", "store to check: local path or s3://bucket/prefix")],
    ).add_argument("--cluster", action="store_true", help="check all nodes of the Ray cluster at RAY_ADDRESS")
    command(
        groups,
        "demo",
        commands.demo,
        "the whole system on the emoji sample, with a kill and a resume",
        [("folder", "folder for data sets, runs, weights and the report")],
    )

    checkpoint = groups.add_parser("checkpoint", help="checkpoints of a run").add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=_Parser
    )
    for action in (*checkpoint_commands.ACTIONS, *checkpoint_upkeep.ACTIONS):
        command(checkpoint, action.name, action.handler, action.summary, [run], action.place)
    dataset = groups.add_parser("dataset", help="committed data sets").add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=_Parser
    )
    where = ("dataset", "data set: local path or s3://bucket/prefix")
    two = [("a", "data set A"), ("b", "data set B")]
    of = dataset_commands
    command(dataset, "verify", of.dataset_verify, "compare every file with its manifest", [where])
    command(
        dataset,
        "audit",
        of.dataset_audit,
        "prove that every source row has one fate and every sample its place; also of an unfinished job",
        [where],
        "system.dataset_commands:AuditConfig",
    )
    command(
        dataset,
        "stats",
        of.dataset_stats,
        "counts, sizes, captions, dropped rows; with output=FOLDER as histograms, PNG and JSON",
        [where],
        "system.dataset_commands:StatsConfig",
    )
    command(
        dataset,
        "remove",
        of.dataset_remove,
        "take samples out: by=url|sha256|id|source values=a,b or list=FILE, reason=..., missing=error|ok",
        [where],
        "system.dataset_commands:RemoveConfig",
    )
    command(dataset, "diff", of.dataset_diff, "samples, captions and recipe that tell two sets apart", two)
    summary = "one new data set of several: A B ... output=C"
    merge = dataset.add_parser("merge", help=summary, description=summary)
    merge.settings = "system.dataset_commands:MergeConfig"
    merge.add_argument("words", nargs="+", metavar="dataset|key=value", help="data sets, and output=FOLDER")
    merge.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    merge.set_defaults(handler=of.dataset_merge)
    return parser


def _version() -> str:
    try:
        return f"maskclip {version('maskclip')}"
    except PackageNotFoundError:
        return "maskclip, not installed as a package"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    if as_json:  # argparse takes no settings after an option, so it goes last
        words = [*(word for word in words if word != "--json"), "--json"]
    try:
        args = build_parser().parse_args(words)
        if getattr(args, "no_settings", False) and args.knobs:
            raise ConfigError(f"{args.knobs[0]}: unknown key, this command has no settings; remove it")
        result = args.handler(args)
        if result is not None:
            commands.show(result, as_json)
        return getattr(result, "exit_code", 0)
    except (Exception, KeyboardInterrupt) as error:
        return _fail(error, as_json)


def _fail(error: BaseException, as_json: bool) -> int:
    code = exit_code_of(error)
    rank = os.environ.get("RANK")
    who = "maskclip" if rank is None else f"maskclip rank {rank}"
    if getattr(error, "agreed", False) and rank not in (None, "0"):
        return code  # all ranks know the same; the first one says it
    if isinstance(error, Hang) and rank is not None and commands.HANDED_OVER in os.environ:
        return code  # the launcher says it, once
    if isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    elif isinstance(error, MaskClipError):
        message = " ".join(str(error).split())
    else:
        traceback.print_exception(error)
        message = f"internal error, please report it with the lines above: {type(error).__name__}"
    print(f"{who}: {message} (exit code {code})", file=sys.stderr, flush=True)
    if as_json and rank is None:
        print(json.dumps({"error": type(error).__name__, "message": message, "exit_code": code}))
    return code


if __name__ == "__main__":
    sys.exit(main())
