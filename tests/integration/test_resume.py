"""Law: a run that was killed and resumed is the run that nobody killed."""

from pathlib import Path

import pytest
import torch

from cluster.events import read_events
from cluster.goodput import build_ledger
from cluster.store import open_store
from system.checkpoints.checkpoint import committed_steps, open_fragments
from tests.support.runs import instants, live_steps, train, train_until_killed, write_recipe

KINDS = ("master", "exp_avg", "exp_avg_sq", "teacher")
EXACT = ("loss", "image_text", "text_image", "distill", "mlm", "grad_norm", "lr", "ids_digest", "slot")


def assert_same_run(found: Path | str, expected: Path, after: int, last: int) -> None:
    ours, theirs = live_steps(found), live_steps(expected)
    assert ours.keys() >= set(range(after + 1, last + 1))
    for step in range(after + 1, last + 1):
        for key in EXACT:
            assert ours[step][key] == theirs[step][key], f"{key} of step {step}"
    stores = open_store(str(found)), open_store(str(expected))
    for kind in KINDS:
        one, other = (open_fragments(store, last).everything(kind) for store in stores)  # type: ignore[arg-type]
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), f"{kind} of {name}"


@pytest.mark.parametrize(("precision", "stage", "workers"), [("fp32", 1, 0), ("bf16", 2, 1)])
def test_killed_and_resumed_is_bit_identical(tmp_path, train_data, precision, stage, workers):
    recipe = write_recipe(tmp_path)
    knobs = (
        f"engine.precision={precision}",
        f"engine.zero_stage={stage}",
        f"data.loader.workers={workers}",
    )
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(recipe, undisturbed, train_data, *knobs)

    train_until_killed(recipe, killed, train_data, *knobs, point="step", step=6, rank=1)
    assert committed_steps(open_store(str(killed))) == [4]
    # All files of step 8 are written, its manifest is not: it must not count.
    train_until_killed(recipe, killed, train_data, *knobs, point="commit", step=8)
    assert committed_steps(open_store(str(killed))) == [4]
    train(recipe, killed, train_data, *knobs)

    assert [event["resumed_step"] for event in instants(killed, "attempt_started")] == [None, 4, 4]
    assert_same_run(killed, undisturbed, after=4, last=12)
    assert_every_second_is_accounted_for(killed)


def assert_every_second_is_accounted_for(run: Path) -> None:
    """In the ledger of a run that was killed twice and resumed."""
    events = read_events(open_store(str(run)))
    ledger = build_ledger(events)
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_seconds, rel=1e-3)
    never = {name for name, seconds in ledger.seconds.items() if seconds == 0}
    assert never <= {"evaluation", "idle"}
    kept = live_steps(run).values()
    assert ledger.seconds["productive"] == pytest.approx(sum(e["step_seconds"] for e in kept), rel=1e-3)
    assert [found.attempt for found in ledger.recoveries] == [1, 2, 3]


def test_world_size_and_stage_change_keep_the_samples(tmp_path, train_data, undisturbed_run):
    """World 2 -> 1 -> 3 at ZeRO 2 -> 1 -> 0: the same sample ids in the same slots, the same loss to
    rounding."""
    recipe = write_recipe(tmp_path)
    elastic = tmp_path / "elastic"
    train_until_killed(recipe, elastic, train_data, "engine.zero_stage=2", point="step", step=5)
    train_until_killed(recipe, elastic, train_data, "engine.zero_stage=1", point="step", step=9, processes=1)
    train(recipe, elastic, train_data, "engine.zero_stage=0", processes=3)
    assert [e["resumed_step"] for e in instants(elastic, "attempt_started")] == [None, 4, 8]
    ours, theirs = live_steps(elastic), live_steps(undisturbed_run)
    for step in range(1, 13):
        assert ours[step]["ids_digest"] == theirs[step]["ids_digest"]
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, train_data, undisturbed_run):
    recipe = write_recipe(tmp_path)
    damaged = tmp_path / "damaged"
    train_until_killed(recipe, damaged, train_data, point="step", step=10)
    victim = damaged / "checkpoints/step-000000008/rank-00001.attempt-0001.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    train(recipe, damaged, train_data)
    assert [event["step"] for event in instants(damaged, "checkpoint_quarantined")] == [8]
    assert [e["resumed_step"] for e in instants(damaged, "attempt_started")] == [None, 4]
    assert list((damaged / "quarantine").iterdir())
    assert_same_run(damaged, undisturbed_run, after=4, last=12)
