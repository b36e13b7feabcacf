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
