"""Reading fragments: any run of any parameter, whatever the cut that it was written in."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cluster.errors import CheckpointIncompatible, ObjectNotFound
from cluster.manifest import Manifest, commit, file_entry
from cluster.store import open_store
from system.checkpoints.checkpoint import (
    FragmentReader,
    committed_steps,
    newest_step,
    open_checkpoint,
    open_fragments,
)

SHAPE = [7, 11]


def write(folder: Path, values: torch.Tensor, cuts: list[int]) -> None:
    """Parameter `w` in one file per run between cuts, committed as step 3 of the run at `folder`."""
    target = folder / "checkpoints/step-000000003"
    target.mkdir(parents=True)
    edges = [0, *cuts, values.numel()]
    entries = []
    for rank, (first, last) in enumerate(pairwise(edges)):
        name = f"rank-{rank:05d}.safetensors"
        tensors = {
            f"master/w/{first}": values.flatten()[first:last].clone(),
            f"exp_avg/pad{rank}/0": values[0],
        }
        save_file(tensors, target / name)
        entries.append(file_entry(target / name, name))
    meta = {"step": 3, "slot": 36, "samples_seen": 36, "parameters": {"w": SHAPE}}
    commit(open_store(str(target)), Manifest("checkpoint", 1, tuple(entries), meta))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_run_reads_back_whatever_the_cut(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    values = torch.randn(*SHAPE)
    cuts = sorted(data.draw(st.sets(st.integers(1, values.numel() - 1), max_size=5)))
    write(folder, values, cuts)
    reader = FragmentReader(*open_checkpoint(open_store(str(folder)), 3))
    start = data.draw(st.integers(0, values.numel() - 1))
    length = data.draw(st.integers(1, values.numel() - start))
    (found,) = reader.read([("master", "w", start, length)])
    assert torch.equal(found, values.flatten()[start : start + length])
    assert torch.equal(open_fragments(open_store(str(folder)), 3).everything("master")["w"], values)


def test_a_run_that_is_not_covered_is_an_error(tmp_path):
    write(tmp_path, torch.randn(*SHAPE), [])
    reader = FragmentReader(*open_checkpoint(open_store(str(tmp_path)), 3))
    for kind, name, start, length in (("teacher", "w", 0, 5), ("master", "v", 0, 5), ("master", "w", 70, 20)):
        with pytest.raises(CheckpointIncompatible, match="covers"):
            reader.read([(kind, name, start, length)])


def test_only_folders_with_a_manifest_are_checkpoints(tmp_path):
    write(tmp_path, torch.randn(*SHAPE), [])
    torn = tmp_path / "checkpoints/step-000000009"
    torn.mkdir()
    (torn / "rank-00000.safetensors").write_bytes(b"half")
    run = open_store(str(tmp_path))
    assert committed_steps(run) == [3]
    assert newest_step(run) == 3
    with pytest.raises(ObjectNotFound, match="committed steps: 3"):
        open_checkpoint(run, 9)
    with pytest.raises(ObjectNotFound, match="no committed checkpoint"):
        newest_step(open_store(str(tmp_path / "elsewhere")))


def test_manifest_is_plain_json(tmp_path):
    write(tmp_path, torch.randn(*SHAPE), [5])
    document = json.loads((tmp_path / "checkpoints/step-000000003/manifest.json").read_text())
    assert document["kind"] == "checkpoint"
    assert [entry["name"] for entry in document["files"]] == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
