"""`maskclip train` before it starts a rank, and what the commands say of checkpoints that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.events import newest_attempt
from cluster.store import open_store
from system import commands, train_command
from system.cli import main
from system.config import load_train_recipe, to_dict
from tests.support.small_dataset import write_dataset
from tests.support.small_run import CHECKPOINTS, STEPS, write_run

RECIPE = """
command: train
run: {uri: none, steps: %d, seed: 5}
data: {uri: none, global_batch: 8, streams: 1}
model: {preset: test}
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`train` on a finished run; starting a rank is an error."""
    write_dataset(str(tmp_path / "data"), (4, 4))
    write_run(str(tmp_path / "run"), str(tmp_path / "data"))
    (tmp_path / "recipe.yaml").write_text(RECIPE % STEPS)
    monkeypatch.setattr(train_command, "run_local", lambda *_: pytest.fail("a rank was started"))
    uris = [f"run.uri={tmp_path / 'run'}", f"data.uri={tmp_path / 'data'}"]
    return ["train", str(tmp_path / "recipe.yaml"), *uris]


def test_a_finished_run_says_so(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_store(str(tmp_path / "run"))
    before = newest_attempt(run)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["last_checkpoint"], found["steps_done"], found["attempt"]) == (STEPS, STEPS, None)
    assert main(words) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert newest_attempt(run) == before


@pytest.mark.parametrize(
    ("data", "knobs", "code", "says"),
    [
        ("data", ("optimizer.lr=1e-2",), 66, "optimizer.lr"),
        ("data", (f"run.steps={STEPS + 1}",), 66, "run.steps"),
        ("other", (), 65, "manifest digest"),
    ],
)
def test_another_run_is_refused_before_an_attempt(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: str,
    knobs: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    write_dataset(str(tmp_path / "other"), (5,))
    run = open_store(str(tmp_path / "run"))
    before = newest_attempt(run)
    assert main([*words[:-1], f"data.uri={tmp_path / data}", *knobs]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert newest_attempt(run) == before


@pytest.mark.parametrize("damage", ["manifest", "file"])
def test_a_damaged_last_checkpoint_is_for_the_ranks(words: list[str], tmp_path: Path, damage: str) -> None:
    folder = tmp_path / f"run/checkpoints/step-{STEPS:09d}"
    if damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "rank-00001.safetensors").unlink()
    assert train_command.finished_step(open_store(str(tmp_path / "run")), STEPS) is None


def test_ranks_take_the_configuration_of_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % STEPS)
    knobs = ["run.uri=a", "data.uri=b", "optimizer.lr=1e-7"]
    checked = load_train_recipe(str(path), knobs)
    monkeypatch.setenv(commands.HANDED_OVER, json.dumps(to_dict(checked)))
    path.write_text(RECIPE % (STEPS + 1))
    assert commands.train_config(str(path), knobs).run.steps == STEPS + 1  # no rank
    monkeypatch.setenv("RANK", "1")
    assert commands.train_config(str(path), knobs) == checked


def test_a_broken_manifest_is_the_problem_of_its_step(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    good, bad = CHECKPOINTS[1], CHECKPOINTS[0]
    (run / f"checkpoints/step-{bad:09d}/manifest.json").write_text("{")
    (run / f"checkpoints/step-{good:09d}/rank-00000.safetensors").unlink()
    assert main(["checkpoint", "verify", str(run), "--json"]) == 66
    found = json.loads(capsys.readouterr().out)
    assert found["checked"] == [f"step {bad}", f"step {good}"]
    assert ["not a manifest" in found["problems"][0], "missing" in found["problems"][1]] == [True, True]
    assert main(["checkpoint", "list", str(run), "--json"]) == 66
    listed = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in listed] == [bad, good]
    assert ["problem" in entry for entry in listed] == [True, False]
    assert main(["checkpoint", "list", str(run)]) == 66
    assert "broken" in capsys.readouterr().out
