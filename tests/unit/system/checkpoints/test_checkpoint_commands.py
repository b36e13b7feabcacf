"""`maskclip checkpoint ...` on a run folder as a trainer leaves it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cluster.errors import CheckpointIncompatible, ConfigError
from cluster.store import open_store
from system import cli
from system.checkpoints.checkpoint import committed_steps, open_fragments, step_folder
from tests.support.small_dataset import flip_byte, write_dataset
from tests.support.small_run import CHECKPOINTS, write_run

FIRST, LAST = CHECKPOINTS


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_dataset(str(folder / "data"), [2])
    write_run(str(folder / "run"), str(folder / "data"))
    return folder / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def checkpoint(capsys):
    def command(*words: object, code: int = 0):
        assert cli.main(["checkpoint", *map(str, words), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return command


def damage(run: Path, step: int) -> None:
    flip_byte(run / f"checkpoints/{step_folder(step)}/rank-00001.safetensors", 20_000)


def test_list_and_show(run, checkpoint):
    assert [(row["step"], row["pinned"]) for row in checkpoint("list", run)] == [
        (FIRST, False),
        (LAST, False),
    ]
    shown = checkpoint("show", run)
    assert (shown["step"], shown["files"], shown["version"]) == (LAST, 2, 2)
    assert shown["kinds"]["master"] == shown["parameters"] > shown["kinds"]["teacher"] > 0


def test_one_broken_manifest_is_that_steps_problem(run, checkpoint):
    (run / f"checkpoints/{step_folder(FIRST)}/manifest.json").write_bytes(b"{")
    rows = checkpoint("list", run, code=CheckpointIncompatible.exit_code)
    assert "manifest" in rows[0]["problem"]
    assert "digest" in rows[1]
    found = checkpoint("verify", run, code=CheckpointIncompatible.exit_code)
    assert len(found["problems"]) == 1
    assert len(found["checked"]) == 2


def test_verify_names_the_file(run, checkpoint):
    assert checkpoint("verify", run)["status"] == "whole"
    damage(run, LAST)
    found = checkpoint("verify", run, code=CheckpointIncompatible.exit_code)
    assert "rank-00001" in found["problems"][0]


def test_diff(run, checkpoint):
    assert checkpoint("diff", run, f"a={LAST}", f"b={LAST}")["equal"]
    found = checkpoint("diff", run, f"a={FIRST}", f"b={LAST}")
    assert not found["equal"]
    relative = [row["relative"] for row in found["parameters"]]
    assert relative == sorted(relative, reverse=True)
    assert checkpoint("diff", run, f"a={LAST}", f"b={LAST}", f"with_run={run}", "kind=teacher")["equal"]


def test_a_copy_is_the_same_checkpoint(run, tmp_path, checkpoint):
    target = tmp_path / "copy"
    assert checkpoint("copy", run, f"to={target}")["steps"] == [FIRST, LAST]
    assert checkpoint("verify", target)["status"] == "whole"
    assert [row["digest"] for row in checkpoint("list", run)] == [
        row["digest"] for row in checkpoint("list", target)
    ]
    one, other = (open_fragments(open_store(str(uri)), LAST).everything("master") for uri in (run, target))
    assert all(torch.equal(one[name], other[name]) for name in one)
    damage(run, FIRST)
    checkpoint("copy", run, f"to={tmp_path / 'no'}", f"step={FIRST}", code=CheckpointIncompatible.exit_code)
    assert committed_steps(open_store(str(tmp_path / "no"))) == []


def test_prune_keeps_the_newest_good_one_and_the_pinned_ones(run, checkpoint):
    checkpoint("pin", run, f"step={FIRST}", "reason=paper")
    assert checkpoint("list", run)[0]["pinned"]
    assert checkpoint("prune", run, "keep_last=1")["steps"] == []
    checkpoint("unpin", run, f"step={FIRST}")
    checkpoint("unpin", run, f"step={FIRST}", code=ConfigError.exit_code)
    damage(run, LAST)
    assert checkpoint("prune", run, "keep_last=1")["steps"] == []
    damage(run, LAST)  # the same bit again: whole
    assert checkpoint("prune", run, "keep_last=1", "dry_run=true")["steps"] == [FIRST]
    assert committed_steps(open_store(str(run))) == [FIRST, LAST]
    assert checkpoint("prune", run, "keep_last=1")["steps"] == [FIRST]
    assert committed_steps(open_store(str(run))) == [LAST]
    damage(run, LAST)
    checkpoint("prune", run, "keep_last=1", code=CheckpointIncompatible.exit_code)


def test_prune_takes_dead_attempts_files_only(run, checkpoint):
    folder = run / "checkpoints" / step_folder(9)
    folder.mkdir()
    dead, live = (folder / f"rank-00000.attempt-{number:04d}.safetensors" for number in (1, 2))
    for path in (dead, live):
        path.write_bytes(b"abc")
    found = checkpoint("prune", run)
    assert found["leftovers"] == [f"checkpoints/{step_folder(9)}/{dead.name}"]
    assert not dead.exists()
    assert live.exists()
    checkpoint("prune", run, "ended=true")
    assert not live.exists()
    assert committed_steps(open_store(str(run))) == [FIRST, LAST]


def test_repair_sets_aside_and_puts_back(run, checkpoint):
    before = (run / f"checkpoints/{step_folder(LAST)}/manifest.json").read_bytes()
    damage(run, LAST)
    assert list(checkpoint("repair", run, "dry_run=true")["quarantined"]) == [str(LAST)]
    assert committed_steps(open_store(str(run))) == [FIRST, LAST]
    checkpoint("repair", run)
    assert committed_steps(open_store(str(run))) == [FIRST]
    assert checkpoint("repair", run)["put_back"] == []
    damage(run, LAST)  # the same bit again: whole
    assert len(checkpoint("repair", run)["put_back"]) == 1
    assert (run / f"checkpoints/{step_folder(LAST)}/manifest.json").read_bytes() == before
    assert list((run / "quarantine").iterdir()) == []
    assert checkpoint("verify", run)["status"] == "whole"
