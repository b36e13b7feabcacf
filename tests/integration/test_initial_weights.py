"""A run that begins from the weights of another."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cluster.store import open_store
from model.config import preset
from model.objective import Objective
from system.checkpoints.checkpoint import open_fragments
from system.config import InitConfig
from system.export.export import ExportConfig, export
from system.export.initial_weights import read_weights
from tests.support.runs import maskclip, write_recipe
from tests.support.small_run import write_run

MODEL, WEIGHTS = preset("test"), "open_clip_model.safetensors"


def test_a_run_begins_from_the_weights_and_never_reads_them_again(train_data: str, tmp_path: Path):
    """The learning rate is zero in fp32, so that the checkpoints hold what the run began from."""
    weights, exported = tmp_path / "weights", tmp_path / "exported"
    write_run(str(tmp_path / "source"), train_data)
    export(str(tmp_path / "source"), ExportConfig(output=str(exported), layout="open_clip"))
    shutil.copytree(exported, weights)
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    rates = [f"optimizer.{name}=1e-300" for name in ("lr", "final_lr", "warmup_lr")]
    knobs = [f"run.uri={run}", f"data.uri={train_data}", "run.steps=2", *rates]
    words = ["train", recipe, *knobs, "checkpoint.every_steps=1"]
    init = InitConfig(uri=str(weights))

    wrong = maskclip(*words, f"init.uri={weights}", "model.embed_dim=32")
    assert wrong.returncode == 66
    lines = [line for line in wrong.stderr.splitlines() if line.startswith("maskclip")]
    assert len(lines) == 1
    assert "visual.proj" in lines[0]
    assert not (run / "config.json").exists()  # so the corrected command is not another run

    done = maskclip(*words, f"init.uri={weights}")
    assert done.returncode == 0, done.stderr[-3000:]
    stored, expected = open_fragments(open_store(str(run)), 2).everything("master"), read_weights(init, MODEL)
    built = dict(Objective(MODEL, seed=5).named_parameters())
    for name, values in stored.items():
        assert torch.equal(values, expected.get(name, built[name])), name
    assert any(not torch.equal(stored[name], built[name]) for name in expected)
    for name, values in open_fragments(open_store(str(run)), 2).everything("teacher").items():
        if name.startswith("vision."):
            assert torch.equal(values, expected[name]), name
    digest = hashlib.sha256((weights / WEIGHTS).read_bytes()).hexdigest()
    assert json.loads((run / "config.json").read_bytes())["initial_weights"] == digest
    result = export(str(run), ExportConfig(output=str(tmp_path / "again")))
    assert result["initial_weights"] == digest
    assert digest in (tmp_path / "again/README.md").read_text("utf-8")

    shutil.move(weights, tmp_path / "elsewhere")
    shutil.rmtree(run / "checkpoints/step-000000002")
    resumed = maskclip(*words, f"init.uri={weights}", "run.processes=1")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    again = open_fragments(open_store(str(run)), 2).everything("master")
    assert all(torch.equal(again[name], stored[name]) for name in stored)

    shutil.rmtree(run / "checkpoints")  # as if it had been stopped before the first one
    shutil.copytree(exported, weights)
    changed = {name: tensor + 1 for name, tensor in load_file(weights / WEIGHTS).items()}
    save_file(changed, weights / WEIGHTS)
    (weights / "manifest.json").unlink()
    other = maskclip(*words, f"init.uri={weights}", "run.processes=1")
    assert other.returncode == 66
    assert f"this run began from weights with SHA-256 {digest}" in other.stderr
