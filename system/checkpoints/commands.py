"""What `maskclip checkpoint list|verify|show|diff` do: each takes the parsed arguments and returns a
`Result`, or raises an error of cluster.errors. A checkpoint that is broken is that step's problem, never the
command's. What changes something is in `checkpoint_upkeep`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import CheckpointIncompatible, DataError
from cluster.manifest import MANIFEST, verify
from cluster.store import ObjectStore, open_store
from system.commands import Args, Result, Rows, knobs, verdict


@dataclass(frozen=True)
class Action:
    """One word after `maskclip checkpoint`."""

    name: str
    handler: Callable[[Args], Result]
    summary: str
    settings: type | None = None

    @property
    def place(self) -> str:
        """Of the settings, as the command line's help wants it."""
        return f"{self.settings.__module__}:{self.settings.__qualname__}" if self.settings else ""


@dataclass(frozen=True, kw_only=True)
class StepKnobs:
    step: int | None = None
    """Step of the checkpoint; the newest if none is given."""


@dataclass(frozen=True, kw_only=True)
class DiffKnobs:
    a: int
    """Step of the first checkpoint."""
    b: int
    """Step of the second one."""
    with_run: str = ""
    """Run of the second one, if it is another."""
    kind: Literal["master", "exp_avg", "exp_avg_sq", "teacher"] = "master"
    """Which of the values are compared."""


def list_all(args: Args) -> Result:
    from system.checkpoints.checkpoint import committed_steps, load_checkpoint_meta
    from system.checkpoints.retention import pinned_steps

    run = open_store(args.run)
    pinned, data = set(pinned_steps(run)), []
    for step in committed_steps(run):
        try:
            m = load_checkpoint_meta(run, step)
            found = {"slot": m.slot, "digest": m.digest, "state_digest": m.meta["state_digest"]}
            found["attempt"] = m.meta.get("attempt")
        except (DataError, KeyError, TypeError) as error:
            found = {"problem": str(error)}
        data.append({"step": step, **found, "pinned": step in pinned})
    rows = [
        (d["step"], d["problem"], "", "", "", "")
        if "problem" in d
        else (
            d["step"],
            d["slot"],
            d["digest"][:12],
            d["state_digest"],
            d["attempt"] or "",
            "pinned" * d["pinned"],
        )
        for d in data
    ]
    columns = ("step", "slot", "manifest", "state", "attempt", "")
    table = Rows(f"checkpoints of {args.run}", columns, rows).table()
    broken = any("problem" in d for d in data)
    return Result(data, table, CheckpointIncompatible.exit_code if broken else 0)


def verify_all(args: Args) -> Result:
    from system.checkpoints.checkpoint import committed_steps

    run = open_store(args.run)
    problems = {f"step {step}": check(run, step) for step in committed_steps(run)}
    return verdict(problems, args.run, "checkpoint", CheckpointIncompatible.exit_code)


def check(run: ObjectStore, step: int) -> list[str]:
    """What is wrong with a checkpoint, every byte of it read."""
    from system.checkpoints.checkpoint import open_checkpoint

    try:
        store, manifest = open_checkpoint(run, step)
        if manifest.meta.get("step") != step:
            return [f"{store.uri}/{MANIFEST}: says step {manifest.meta.get('step')}"]
        return verify(store, manifest)
    except DataError as error:
        return [str(error)]


def show(args: Args) -> Result:
    from system.checkpoints.checkpoint import FragmentReader, newest_step, open_checkpoint

    run = open_store(args.run)
    step = newest_step(run, knobs(args, StepKnobs).step)
    store, manifest = open_checkpoint(run, step)
    reader = FragmentReader(store, manifest)
    meta = {k: v for k, v in manifest.meta.items() if k not in ("config", "parameters", "recent_losses")}
    kinds = {
        kind: len(reader.parameters(kind)) for kind in ("master", "exp_avg", "exp_avg_sq", "teacher", "state")
    }
    data: dict[str, Any] = {
        **meta,
        "digest": manifest.digest,
        "version": manifest.version,
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files),
        "parameters": len(reader.shapes),
        "kinds": kinds,
    }
    return Result(data, Rows(store.uri, ("what", "value"), list(data.items())).table())


def diff(args: Args) -> Result:
    """Relative distance by parameter, one parameter at a time."""
    from system.checkpoints.checkpoint import open_fragments

    config = knobs(args, DiffKnobs)
    a = open_fragments(open_store(args.run), config.a)
    b = open_fragments(open_store(config.with_run or args.run), config.b)
    found, only = [], []
    for name in sorted({*a.parameters(config.kind), *b.parameters(config.kind)}):
        if a.shapes.get(name) != b.shapes.get(name):
            only.append(f"{name}: {a.shapes.get(name)} and {b.shapes.get(name)}")
            continue
        one, other = (reader.whole(config.kind, name).double() for reader in (a, b))
        change = float((one - other).norm())
        found.append(
            {
                "parameter": name,
                "relative": change / max(float(one.norm()), 1e-30),
                "largest": float((one - other).abs().max()),
                "equal": change == 0,
            }
        )
    found.sort(key=lambda row: -row["relative"])
    data = {"equal": not only and all(row["equal"] for row in found), "parameters": found, "shapes": only}
    rows = [(f["parameter"], f"{f['relative']:.3e}", f"{f['largest']:.3e}") for f in found[:40]]
    rows += [(line, "", "") for line in only]
    title = f"{config.kind}: {'equal' if data['equal'] else 'largest changes'}, {len(found)} parameters"
    return Result(data, Rows(title, ("parameter", "relative", "largest element"), rows).table())


ACTIONS = (
    Action("list", list_all, "committed checkpoints of a run"),
    Action("verify", verify_all, "compare every file with its manifest"),
    Action("show", show, "what one checkpoint holds: step=N, else the newest", StepKnobs),
    Action(
        "diff", diff, "how far the state moved: a=STEP b=STEP, with_run=RUN for b of another run", DiffKnobs
    ),
)
