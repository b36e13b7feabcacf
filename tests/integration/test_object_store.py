"""The same job with everything in an object store, on two real servers; the environment says where."""

import json

from cluster.store import open_store
from system.checkpoints.checkpoint import committed_steps
from tests.integration.conftest import preprocess_to
from tests.support.runs import instants, live_steps, maskclip, train, train_until_killed, write_recipe


def test_main_job_on_s3(tmp_path, any_s3, undisturbed_run, eval_data):
    recipe = write_recipe(tmp_path)
    data, run = f"{any_s3}/data", f"{any_s3}/runs/one"
    assert preprocess_to(data, "train", 3, tmp_path) == 0
    cache = f"data.loader.cache={tmp_path / 'cache'}"
    train_until_killed(recipe, run, data, cache, point="step", step=6)
    train(recipe, run, data, cache)
    assert committed_steps(open_store(run)) == [4, 8, 12]
    assert [event["resumed_step"] for event in instants(run, "attempt_started")] == [None, 4]

    ours, theirs = live_steps(run), live_steps(undisturbed_run)
    assert {step: ours[step]["loss"] for step in ours} == {step: theirs[step]["loss"] for step in theirs}

    verified = maskclip("checkpoint", "verify", run, "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["status"] == "whole"
    scores = maskclip("evaluate", run, f"data={eval_data}", "--json")
    assert scores.returncode == 0, scores.stderr
    assert 0 <= json.loads(scores.stdout)["retrieval"]["image_to_text"]["r5"] <= 1
    exported = maskclip("export", run, f"output={any_s3}/export", "--json")
    assert exported.returncode == 0, exported.stderr
    page = tmp_path / "report.html"
    reported = maskclip("report", run, f"output={page}", "--json")
    assert reported.returncode == 0, reported.stderr
    assert "<html" in page.read_text()
