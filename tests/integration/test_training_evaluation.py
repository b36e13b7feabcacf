"""Evaluation in training: the scores are those of the checkpoint, at any number of processes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.local_launch import run_local
from cluster.store import open_store
from system.report.history import load_history
from tests.support import evaluation_worker
from tests.support.paths import ROOT
from tests.support.runs import instants, maskclip, train, write_recipe
from tests.support.small_dataset import write_dataset

SCORES = ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1", "text_to_image_r5", "top1", "knn_top1")


def evaluated(folder: Path, processes: int, *words: str) -> list[dict[str, Any]]:
    """The evaluation events of a fresh model on 21 pictures, in `processes` processes."""
    data, learn = folder / "data", folder / "train"
    if not data.exists():
        write_dataset(str(data), [13, 8])
        write_dataset(str(learn), [30])
    run = folder / f"run-{processes}-{len(words)}"
    argv = [sys.executable, evaluation_worker.__file__, str(run), str(data), str(learn), *words]
    assert run_local(argv, processes, {"PYTHONPATH": str(ROOT)}) == 0
    return instants(run, "evaluation") + instants(run, "evaluation_failed")


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path: Path):
    alone, shared, many = (evaluated(tmp_path, processes) for processes in (1, 2, 4))
    assert [event["step"] for event in alone] == [5, 7]  # when it is due, and at the end
    for one, two, four in zip(alone, shared, many, strict=True):
        for name in SCORES:
            assert one[name] == two[name] == four[name], name
        assert one["chance"] == two["chance"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_image_that_one_rank_cannot_read_stops_nobody(tmp_path: Path, rank: str):
    failed = evaluated(tmp_path, 2, rank)
    assert [(event["name"], event["step"]) for event in failed] == [
        ("evaluation_failed", 5),
        ("evaluation_failed", 7),
    ]
    assert "is broken for the test" in failed[0]["reason"]


def test_training_scores_are_those_of_its_checkpoints(tmp_path: Path, train_data: str, eval_data: str):
    run = tmp_path / "run"
    knobs = (f"evaluation.data={eval_data}", "evaluation.every_steps=4", "evaluation.batch=16")
    train(write_recipe(tmp_path), run, train_data, *knobs)
    during = {event["step"]: event for event in instants(run, "evaluation")}
    assert sorted(during) == [4, 8, 12]
    words = ("evaluate", run, f"data={eval_data}", "every=true", "batch=16", "pictures=0", "--json")
    done = maskclip(*words)
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout)["results"]
    assert [result["step"] for result in after] == [4, 8, 12]
    for result in after:
        event = during[result["step"]]
        for direction in ("image_to_text", "text_to_image"):
            for cutoff in ("r1", "r5"):
                assert event[f"{direction}_{cutoff}"] == result["retrieval"][direction][cutoff]
        assert event["top1"] == result["zero_shot"]["top1"]
    assert {mark.step for mark in load_history(open_store(str(run))).evaluations} == {4, 8, 12}


def test_what_is_wrong_with_the_settings_shows_before_the_first_step(tmp_path: Path, train_data: str):
    recipe = write_recipe(tmp_path)
    words = ("train", recipe, f"run.uri={tmp_path / 'run'}", f"data.uri={train_data}")
    done = maskclip(*words, f"evaluation.data={tmp_path / 'nothing'}")
    assert done.returncode == 65
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr
    done = maskclip(*words, f"evaluation.data={train_data}", "evaluation.tasks=[linear_probe]")
    assert done.returncode == 64
    assert "evaluation" in done.stderr
