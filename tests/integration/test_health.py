"""Laws: what is not finite changes nothing, is counted and named, and is skipped when it stays; a rank that
hangs or computes something else ends the attempt with a name."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_resume import assert_same_run
from tests.support.poisoned_runs import Fault, PoisonedRuns
from tests.support.runs import instants, live_steps, write_recipe

BATCH = 24


@pytest.fixture(scope="module")
def runs() -> Iterator[PoisonedRuns]:
    with PoisonedRuns() as runs:
        yield runs


def end_reasons(run: Path) -> list[str]:
    return [event["reason"] for event in instants(run, "attempt_ended")]


def test_non_finite_steps_are_refused_then_skipped_and_nothing_else_changes(runs, tmp_path, train_data):
    """Once in a loss, once in a gradient: tried again. Three times in window 6: rolled back to step 4 and
    skipped. What comes out is the run that was told to skip window 6, to the bit."""
    recipe, run, told = write_recipe(tmp_path), tmp_path / "run", tmp_path / "told"
    once: list[Fault] = [("loss", 1, 2, 2, 1), ("gradient", 0, 3, 3, 1)]
    assert runs.train(recipe, run, train_data, faults=[*once, ("loss", 1, 6, 6, 3)]) == [76, 76]
    refused = instants(run, "step_refused")
    assert [(event["step"], event["ranks"]) for event in refused] == [(2, [1]), (3, [0]), *[(6, [1])] * 3]
    assert refused[0]["reason"].startswith("non-finite loss on 1 ranks (rank 1")
    assert refused[1]["reason"].startswith("non-finite gradient (rank 0")
    assert f"slots {6 * BATCH} to {7 * BATCH - 1}" in end_reasons(run)[0]
    (record,) = (json.loads(path.read_text()) for path in (run / "skips").iterdir())
    assert (record["window"], record["step"], record["attempt"]) == (6, 6, 1)

    hopeless = tmp_path / "hopeless"
    shutil.copytree(run, hopeless)
    assert runs.train(recipe, run, train_data) == [0, 0]
    shutil.copytree(run / "skips", told / "skips")
    assert runs.train(recipe, told, train_data) == [0, 0]
    assert_same_run(run, told, after=0, last=12)
    slots = [live_steps(run)[step]["slot"] // BATCH for step in range(1, 13)]
    assert slots == [0, 1, 2, 3, 4, 5, *range(7, 13)]

    # At another world size, and from a checkpoint that lies behind the window: the same samples.
    shutil.rmtree(run / "checkpoints/step-000000012")
    assert runs.train(recipe, run, train_data, processes=1) == [0]
    for step in range(9, 13):
        for key in ("slot", "ids_digest"):
            assert live_steps(run)[step][key] == live_steps(told)[step][key]

    # The next window is no better: it is not the samples.
    assert runs.train(recipe, hopeless, train_data, faults=[("gradient", 1, 6, 99, 99)]) == [76, 76]
    assert "it is not the samples" in end_reasons(hopeless)[1]
    assert len(list((hopeless / "skips").iterdir())) == 1


def test_a_copy_that_differs_ends_the_run(runs, tmp_path, train_data):
    """At stage 0 every rank updates its own copy, so a flipped bit stays."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    knobs = ("health.compare_every=2", "engine.zero_stage=0")
    assert runs.train(recipe, run, train_data, *knobs, faults=[("memory", 1, 2, 2, 1)]) == [77, 77]
    (reason,) = end_reasons(run)
    assert reason.startswith("DeviceFault: step 4: ")
    assert "on rank 0, 1" in reason, "of two nobody can tell which"


def test_a_hang_leaves_stacks_and_a_spike_after_the_resume_is_seen(runs, tmp_path, train_data):
    """At stage 3. The ranks' copies are compared all the time, and none differs."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    knobs = ("run.steps=40", "engine.zero_stage=3", "health.compare_every=2", "health.on_spike=rollback")
    limits = ("watchdog.floor_seconds=5", "watchdog.times_median=40")
    codes = runs.train(recipe, run, train_data, *knobs, *limits, faults=[("hang", 1, 21, 21, 1)])
    assert codes == [77, 77]
    stacks = [
        (run / f"hangs/attempt-0001/rank-0000{rank}.txt").read_text().split("\n", 1) for rank in range(2)
    ]
    heads = [json.loads(head) for head, _ in stacks]
    assert [head["steps_done"] for head in heads] == [21, 21]
    assert [head["phase"] for head in heads] == ["forward", "forward"]
    # The one that waits does so inside of the passes, the one that hangs has not begun them.
    assert ["accumulate.py" in stack for _, stack in stacks] == [True, False]
    assert heads[0]["limit_seconds"] < 300
    assert instants(run, "hang")
    ratios = [live_steps(run)[step]["moment_ratio_vision"] for step in (20, 21)]
    assert min(ratios) > 0

    # From step 20. A loss is compared with those before, which the checkpoint remembers.
    assert runs.train(recipe, run, train_data, *knobs, faults=[("spike", 0, 21, 21, 1)]) == [76, 76]
    (record,) = (json.loads(path.read_text()) for path in (run / "skips").iterdir())
    assert (record["window"], record["step"], record["attempt"]) == (21, 21, 2)
    assert end_reasons(run)[-1].startswith("LossSpike: step 21, ")
    assert max(live_steps(run)) == 21
