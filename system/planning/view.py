"""A plan for a terminal."""

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from system.planning.memory import Memory
from system.planning.plan import Plan

_GIB = 2.0**30


def render(plan: Plan) -> RenderableType:
    """For a terminal."""
    facts = plan.facts
    columns: dict[str, Callable[[Memory], float]] = {
        "parameters": lambda m: m.parameters,
        "gradients": lambda m: m.gradients,
        "optimizer": lambda m: m.optimizer,
        "teacher": lambda m: m.teacher,
        "activations": lambda m: m.activations + m.gathered,
        "bucket": lambda m: m.bucket,
        "most of a step": lambda m: m.device,
        "host": lambda m: m.host,
    }
    memory = Table("GiB of a rank", *columns, "fits", box=None)
    for stage, found in plan.stages.items():
        mark = " (recipe)" if stage == facts["zero_stage"] else ""
        cells = (f"{part(found) / _GIB:.2f}" for part in columns.values())
        memory.add_row(f"ZeRO {stage}{mark}", *cells, "yes" if facts["fits"][stage] else "no")
    rows = Table(box=None, show_header=False)
    for name, value in _rows(facts):
        rows.add_row(name, Text(value, style="bold"))
    mfu, gpu, between = facts["mfu"], facts["gpu"], facts["mean_failure_hours"]
    store, copy = facts["store_gb_per_second"], facts["snapshot_gb_per_second"]
    stated = (
        f"Stated, not measured: {mfu:.0%} of {gpu}'s peak; {store:g} GB/s to the store per node, "
        f"{copy:g} GB/s of a rank to host memory; a failure every {between:g} h and "
        f"{facts['restart_seconds']:g} s to start again. Memory is without the CUDA context, workspaces and "
        "fragmentation."
    )
    return Group(memory, "", rows, "", Text(stated, style="dim"))


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("parameters", f"{facts['parameters'] / 1e6:,.1f} M"),
        ("FLOPs per pair", f"{facts['flops_per_pair'] / 1e9:,.1f} G"),
        ("step", f"{facts['step_seconds']:.3f} s for {facts['global_batch']:,} pairs"),
        (
            "pairs per second",
            f"{facts['pairs_per_second']:,.0f}, {facts['pairs_per_second_per_gpu']:,.0f} per GPU",
        ),
        (
            "read from the store",
            f"{facts['store_bytes_per_second'] / 1e6:,.0f} MB/s, "
            f"{facts['store_bytes_per_second_per_node'] / 1e6:,.0f} MB/s per node",
        ),
        (
            "checkpoint",
            f"{facts['checkpoint_bytes'] / 1e9:.2f} GB every {facts['checkpoint_interval_seconds']:,.0f} s, "
            f"written in {facts['checkpoint_save_seconds']:.1f} s, "
            f"stall {facts['checkpoint_stall_seconds']:.2f} s",
        ),
        ("lost to saves and failures", f"{facts['expected_loss']:.2%}"),
        ("to the goal", f"{facts['days']:,.2f} days, {facts['gpu_hours']:,.0f} GPU-hours"),
    ]
    if "pairs_per_second_per_worker" in facts:
        need = f"{facts['pairs_per_second_per_worker']:,.0f} pairs per second"
        rows.insert(4, ("each loader worker", need))
    return rows
