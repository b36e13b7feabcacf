"""Commands about runs that are to come: their job files, what they need, how they would fare."""

import argparse
from pathlib import Path

from cluster.errors import ConfigError
from system.commands import Result, knobs

Args = argparse.Namespace


def render_job(args: Args) -> Result:
    """`maskclip render KIND RECIPE`: the file goes to `output`, or to stdout."""
    from cluster.render import JobConfig, render
    from system.config import load_train_recipe

    job = knobs(args, JobConfig)
    load_train_recipe(args.recipe, list(job.settings))
    text = render(args.kind, Path(args.recipe), job)
    if not job.output:
        return Result({"kind": args.kind, "text": text}, text.rstrip("\n"))
    try:
        Path(job.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{job.output}: cannot be written ({error.strerror}); change output") from None
    return Result({"kind": args.kind, "written": job.output}, f"written: {job.output}")


def render_monitoring(args: Args) -> Result:
    """`maskclip render KIND FOLDER`: the configuration of what watches a training."""
    from system.monitoring.render import render

    written = [str(path) for path in render(args.kind, Path(args.output))]
    return Result({"kind": args.kind, "written": written}, "\n".join(written))


def plan(args: Args) -> Result:
    """`maskclip plan RECIPE`: before anything is started."""
    from system.config import load_train_recipe
    from system.planning.plan import PlanConfig, make_plan
    from system.planning.view import render

    wanted = knobs(args, PlanConfig)
    found = make_plan(load_train_recipe(args.recipe, list(wanted.settings)), wanted)
    return Result(found.facts, render(found))


def simulation(args: Args) -> Result:
    """`maskclip simulate [RUN]`: with the costs that the run has measured."""
    from system.planning.simulation import SimulateConfig, run_simulation, table

    # argparse takes the first setting for the run when no run is given.
    if args.run is not None and "=" in args.run:
        args.knobs, args.run = [args.run, *args.knobs], None
    found = run_simulation(args.run, knobs(args, SimulateConfig))
    return Result(found, table(found))
