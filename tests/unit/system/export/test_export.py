"""Exports: what is in them, that they verify, that none is overwritten; the documented checkpoint format."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from cluster.errors import CheckpointIncompatible, ConfigError, DataError, ManifestMismatch, ObjectNotFound
from cluster.store import open_store
from model import convert
from model.config import preset
from system.checkpoints.checkpoint import open_fragments
from system.export.export import ExportConfig, export, load_export, load_trained
from tests.support.paths import ROOT
from tests.support.small_dataset import flip_byte, picture, write_dataset
from tests.support.small_run import run_config, student_and_teacher, write_run

READER = ROOT / "examples/read_checkpoint.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("export")
    write_dataset(str(folder / "data"), [5])
    write_run(str(folder / "run"), str(folder / "data"))
    return str(folder / "run")


def code_block(text: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def test_export_is_the_newest_checkpoint_without_the_branches_of_training(run: str, tmp_path: Path):
    result = export(run, ExportConfig(output=str(tmp_path / "out")))
    assert (result["step"], result["tower"], result["written"]) == (12, "student", True)
    student, _ = student_and_teacher(run_config(run, "somewhere"), 12)
    weights = load_file(tmp_path / "out/model.safetensors")
    training = ("decoder.", "quantizer.", "text_decoder.", "mlm_head.")
    assert weights.keys() == {name for name in student if not name.startswith(training)}
    for name, weight in weights.items():
        assert torch.equal(weight, student[name])


def test_teacher_export_has_the_averaged_image_tower(run: str, tmp_path: Path):
    export(run, ExportConfig(output=str(tmp_path / "out"), checkpoint=6, tower="teacher"))
    student, teacher = student_and_teacher(run_config(run, "somewhere"), 6)
    for name, weight in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(weight, (teacher if name.startswith("vision.") else student)[name])


def test_loaded_export_is_the_model_and_says_where_it_comes_from(run: str, tmp_path: Path):
    result = export(run, ExportConfig(output=str(tmp_path)))
    model, config = load_export(str(tmp_path))
    assert not model.training
    stored, built = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert stored.keys() == built.keys()
    assert all(torch.equal(stored[name], built[name]) for name in stored)
    assert config["provenance"]["step"] == 12
    assert all(config["provenance"][name] == result[name] for name in ("checkpoint", "dataset", "run"))
    assert config["preprocessing"]["image_size"] == model.config.vision.image_size
    assert json.loads((tmp_path / "manifest.json").read_bytes())["kind"] == "export"


def test_same_export_again_changes_nothing(run: str, tmp_path: Path):
    first = export(run, ExportConfig(output=str(tmp_path)))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = export(run, ExportConfig(output=str(tmp_path)))
    assert (second["digest"], second["written"]) == (first["digest"], False)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_another_export_is_refused_and_the_first_stays_whole(run: str, tmp_path: Path):
    export(run, ExportConfig(output=str(tmp_path)))
    with pytest.raises(ManifestMismatch, match=r"another committed export \(step 12, student"):
        export(run, ExportConfig(output=str(tmp_path), checkpoint=6))
    assert load_export(str(tmp_path))[1]["provenance"]["step"] == 12


def test_a_folder_with_something_else_is_refused(run: str, tmp_path: Path):
    write_dataset(str(tmp_path), [2])
    with pytest.raises(ManifestMismatch, match="holds a dataset"):
        export(run, ExportConfig(output=str(tmp_path)))


def test_what_a_broken_export_left_is_no_export_and_is_replaced(run: str, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ObjectNotFound, match="not a committed export"):
        load_export(str(tmp_path))
    export(run, ExportConfig(output=str(tmp_path)))
    load_export(str(tmp_path))


def test_damaged_export_is_an_error(run: str, tmp_path: Path):
    export(run, ExportConfig(output=str(tmp_path)))
    flip_byte(tmp_path / "model.safetensors", 5000)
    with pytest.raises(ManifestMismatch, match=r"model\.safetensors: sha256"):
        load_export(str(tmp_path))


def test_export_to_an_s3_store(run: str, s3_env: str):
    result = export(run, ExportConfig(output=f"{s3_env}/export"))
    assert result["written"]
    assert load_export(f"{s3_env}/export")[1]["provenance"]["checkpoint"] == result["checkpoint"]
    with pytest.raises(ManifestMismatch, match="another committed export"):
        export(run, ExportConfig(output=f"{s3_env}/export", tower="teacher"))


def test_missing_run_and_missing_checkpoint_are_errors(run: str, tmp_path: Path):
    with pytest.raises(ObjectNotFound, match="not a run folder"):
        export(str(tmp_path / "nothing"), ExportConfig(output=str(tmp_path / "out")))
    with pytest.raises(ObjectNotFound, match="no committed checkpoint at step 7; committed steps: 6, 12"):
        export(run, ExportConfig(output=str(tmp_path / "out"), checkpoint=7))
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_model_is_an_error(run: str, tmp_path: Path):
    store = open_store(run)
    record = json.loads(store.get("config.json"))
    record["config"]["model"]["embed_dim"] = 32
    other = open_store(str(tmp_path / "run"))
    for info in store.list():
        other.put(info.key, store.get(info.key))
    other.put("config.json", json.dumps(record).encode())
    with pytest.raises(CheckpointIncompatible, match=r"image_projection\.weight has the shape"):
        export(str(tmp_path / "run"), ExportConfig(output=str(tmp_path / "out")))


def test_the_example_of_the_model_card_runs(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export(run, ExportConfig(output=str(tmp_path)))
    (tmp_path / "picture.jpg").write_bytes(picture(1))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    code = code_block(card).replace("path/of/this/folder", str(tmp_path))
    exec(compile(code.replace("picture.jpg", str(tmp_path / "picture.jpg")), "model card", "exec"), {})
    assert "tensor([[" in capsys.readouterr().out


def test_card_says_how_it_was_trained_and_what_evaluations_found(run: str, tmp_path: Path):
    copy, output = tmp_path / "run", str(tmp_path / "out")
    shutil.copytree(run, copy)
    result = export(str(copy), ExportConfig(output=output))
    before = (tmp_path / "out/README.md").read_text("utf-8")
    assert "was not evaluated before the export" in before
    for fact in (result["dataset"], result["checkpoint"], "step 12", "| samples seen | 96 |", "seed 5"):
        assert fact in before
    assert "weight_decay: 0.5" in before
    scores = {"zero_shot": {"top1": 0.25, "source": "captions"}, "retrieval": {"image_to_text": {"r1": 0.5}}}
    for name, step, tower in (("a", 12, "student"), ("b", 12, "teacher"), ("c", 6, "student")):
        document = {"step": step, "tower": tower, "data": {"uri": f"set-{name}"}, "scores": scores}
        path = copy / f"evaluations/step-{step:09d}-{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))
    with pytest.raises(ManifestMismatch, match=r"of the same checkpoint, but with another README\.md"):
        export(str(copy), ExportConfig(output=output))
    export(str(copy), ExportConfig(output=str(tmp_path / "later")))
    after = (tmp_path / "later/README.md").read_text("utf-8")
    assert [line for line in after.splitlines() if line.startswith("| set-")] == [
        "| set-a | zero shot top1 | 0.25 |",
        "| set-a | retrieval image to text r1 | 0.5 |",
    ]
    (copy / "evaluations/step-000000012-a.json").write_text("{")
    with pytest.raises(DataError, match=r"step-000000012-a\.json: not JSON"):
        export(str(copy), ExportConfig(output=str(tmp_path / "broken")))


@pytest.mark.parametrize("tower", ["student", "teacher"])
@pytest.mark.parametrize("layout", ["maskclip", "hugging_face", "open_clip"])
def test_streamed_file_is_that_of_the_whole_state(run: str, tmp_path: Path, layout, tower):
    result = export(run, ExportConfig(output=str(tmp_path), layout=layout, tower=tower))
    model = load_trained(open_store(run), None, tower).model
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    whole = {
        entry.name: entry.make(state.__getitem__).contiguous()
        for entry in convert.exported(model.config, layout)
    }
    (file,) = tmp_path.glob("*.safetensors")
    assert file.read_bytes() == save(whole, metadata={"format": "pt"})
    assert result["parameters"] == sum(tensor.numel() for tensor in whole.values())


def memory_of_exports(tower: str, *runs: Path) -> list[int]:
    """See `export_memory`."""
    argv = [sys.executable, str(ROOT / "tests/support/export_memory.py"), tower, *map(str, runs)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_memory_does_not_grow_with_the_layers(tmp_path: Path):
    """24 more layers of the image tower are 19 MB of weights; what an export adds at its peak is less."""
    write_dataset(str(tmp_path / "data"), [2])
    base = preset("test")
    for layers in (1, 25):
        vision = replace(base.vision, width=128, layers=layers)
        text = replace(base.text, vocab_size=1000, layers=1)
        distill = replace(base.distill, weight=0.0)
        model = replace(base, vision=vision, text=text, distill=distill)
        write_run(str(tmp_path / f"run-{layers}"), str(tmp_path / "data"), model)
    small, large, weights = memory_of_exports("student", tmp_path / "run-1", tmp_path / "run-25")
    assert weights > 19 << 20
    assert large < small + (weights - small) / 4


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path):
    """One of 51 MB, against a model without it: at most 1.2 times as much, and two requests of 8 MiB."""
    write_dataset(str(tmp_path / "data"), [2])
    base = preset("test")
    for words in (1000, 200_000):
        text = replace(base.text, vocab_size=words)
        write_run(str(tmp_path / f"run-{words}"), str(tmp_path / "data"), replace(base, text=text))
    largest = 4 * 200_000 * base.text.width
    for tower in ("student", "teacher"):
        small, large, weights = memory_of_exports(tower, tmp_path / "run-1000", tmp_path / "run-200000")
        assert weights > largest
        assert large - small < 1.2 * largest + (16 << 20)


def test_layout_of_others_is_not_for_load_export(run: str, tmp_path: Path):
    export(run, ExportConfig(output=str(tmp_path), layout="open_clip"))
    assert json.loads((tmp_path / "maskclip.json").read_bytes())["provenance"]["step"] == 12
    with pytest.raises(ManifestMismatch, match="is in the layout open_clip; load it with that library"):
        load_export(str(tmp_path))


def test_model_that_open_clip_cannot_say_is_refused(tmp_path: Path):
    write_dataset(str(tmp_path / "data"), [2])
    base = preset("test")
    model = replace(base, text=replace(base.text, activation="quick_gelu"))
    write_run(str(tmp_path / "run"), str(tmp_path / "data"), model)
    with pytest.raises(ConfigError, match="one activation for both towers, this model has gelu"):
        export(str(tmp_path / "run"), ExportConfig(output=str(tmp_path / "out"), layout="open_clip"))
    assert not (tmp_path / "out").exists()


def test_teacher_of_a_run_without_one_is_refused(tmp_path: Path):
    write_dataset(str(tmp_path / "data"), [2])
    base = preset("test")
    model = replace(base, distill=replace(base.distill, weight=0.0))
    write_run(str(tmp_path / "run"), str(tmp_path / "data"), model)
    with pytest.raises(CheckpointIncompatible, match=r"has no teacher .* choose tower=student"):
        export(str(tmp_path / "run"), ExportConfig(output=str(tmp_path / "out"), tower="teacher"))


def test_the_example_reads_a_checkpoint(run: str):
    assert len(READER.read_text("utf-8").splitlines()) < 100
    names = run_path(str(READER))
    for kind in ("master", "exp_avg", "teacher"):
        theirs = names["read_checkpoint"](f"{run}/checkpoints/step-000000012", kind)
        ours = open_fragments(open_store(run), 12).everything(kind)
        assert theirs.keys() == ours.keys()
        assert all(np.array_equal(theirs[name], ours[name].numpy()) for name in ours)


def test_the_example_knows_only_safetensors_and_numpy(run: str):
    words = [str(READER), f"{run}/checkpoints/step-000000012", "master", "logit_scale"]
    code = (
        "import sys; sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    code += "; assert not {'torch', 'deepspeed', 'system', 'cluster'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("logit_scale [1]")


def test_the_example_refuses_a_damaged_checkpoint(run: str, tmp_path: Path):
    source = open_store(f"{run}/checkpoints/step-000000006")
    for info in source.list():
        (tmp_path / info.key).write_bytes(source.get(info.key))
    flip_byte(tmp_path / "rank-00001.safetensors", 20_000)
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors: is not what the manifest says"):
        run_path(str(READER))["read_checkpoint"](str(tmp_path))
