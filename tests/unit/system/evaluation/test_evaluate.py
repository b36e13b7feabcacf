"""Evaluation of a checkpoint against the same numbers worked out from its export."""

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from cluster.errors import ConfigError, DataError, ManifestMismatch, NonFinite, ObjectNotFound
from cluster.manifest import Manifest, commit, file_entry
from cluster.store import open_store
from data_pipeline.records import DATASET_KIND, DATASET_VERSION
from system.checkpoints.checkpoint import open_checkpoint, sealed
from system.evaluation.evaluate import EvaluateConfig, evaluate, evaluations
from system.evaluation.figures import write_scores
from system.evaluation.view import render, render_several
from system.export.export import ExportConfig, export, load_export
from system.report.history import load_history
from system.report.report import write_report
from system.report.story import load_run
from tests.support.small_dataset import write_dataset
from tests.support.small_run import CHECKPOINTS, write_run
from tests.support.stored_batches import eval_batches

SAMPLES = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a data set of 11 pictures in two shards."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_dataset(str(folder / "data"), [7, 4])
    write_run(str(folder / "run"), str(folder / "data"))
    return folder


def config(folder: Path, **changes) -> EvaluateConfig:
    return EvaluateConfig(**{"data": str(folder / "data"), "batch": 16, **changes})


def stored(folder: Path, name: str) -> dict:
    (path,) = (folder / "run/evaluations").glob(name)
    return json.loads(path.read_bytes())


@pytest.mark.parametrize("tower", ["student", "teacher"])
def test_scores_are_those_of_the_exported_model(folder: Path, tmp_path: Path, tower):
    result = evaluate(str(folder / "run"), config(folder, tower=tower))

    export(str(folder / "run"), ExportConfig(output=str(tmp_path), tower=tower))
    model, _ = load_export(str(tmp_path))
    (batch,) = eval_batches(str(folder / "data"), 32, SAMPLES)
    with torch.no_grad():
        scores = model.encode_image(batch["image"]) @ model.encode_text(batch["tokens"]).T
    for direction, matrix in (("image_to_text", scores), ("text_to_image", scores.T)):
        order = matrix.argsort(dim=1, descending=True)
        for k in (1, 5, 10):
            hits = (order[:, :k] == torch.arange(SAMPLES)[:, None]).any(dim=1)
            assert result["retrieval"][direction][f"r{k}"] == pytest.approx(float(hits.double().mean()))
            assert result["retrieval"]["chance"][direction][f"r{k}"] == pytest.approx(k / SAMPLES)
    assert (result["step"], result["tower"]) == (CHECKPOINTS[-1], tower)
    assert result["data"]["samples"] == SAMPLES


def test_batch_does_not_change_the_scores(folder: Path):
    one, all_at_once = (evaluate(str(folder / "run"), config(folder, batch=size)) for size in (3, 64))
    for part in ("retrieval", "zero_shot"):
        assert one[part] == all_at_once[part]


def test_result_is_stored_with_examples_and_an_event(folder: Path):
    seen = []
    result = evaluate(str(folder / "run"), config(folder, pictures=6, checkpoint=6), seen.append)
    document = stored(folder, f"step-000000006-{result['data']['digest'][:8]}.json")
    assert document["retrieval"] == result["retrieval"]
    assert {(state["stage"], state["done"] == state["total"]) for state in seen} >= {
        (stage, True) for stage in ("images", "texts", "classes")
    }

    images, texts = document["examples"]["image_to_text"], document["examples"]["text_to_image"]
    assert [len(images), len(texts)] == [3, 3]
    for example in (*images, *texts):
        assert len(example["answers"]) == 5
        scores = [answer["score"] for answer in example["answers"]]
        assert scores == sorted(scores, reverse=True)
        right = [answer["right"] for answer in example["answers"]]
        assert right == [answer["caption"] == example["caption"] for answer in example["answers"]]
        assert (right.index(True) + 1 if True in right else 6) == min(example["rank"], 6)
    shown = {item["picture"] for e in (*images, *texts) for item in (e, *e["answers"]) if "picture" in item}
    assert document["pictures"].keys() == {str(position) for position in shown}
    for picture in document["pictures"].values():
        assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "JPEG"

    record = load_run(open_store(str(folder / "run")))
    (mark,) = [mark for mark in record.history.evaluations if mark.step == 6]
    assert mark.facts["image_to_text_r5"] == result["retrieval"]["image_to_text"]["r5"]
    assert result["file"].endswith(mark.facts["file"])
    assert document in record.evaluations

    json.dumps(result, allow_nan=False)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(result))
    assert "zero-shot, 11 classes" in console.export_text()


def test_all_checkpoints_or_those_of_a_list(folder: Path, tmp_path: Path):
    results = list(evaluations(str(folder / "run"), config(folder, every=True, pictures=0)))
    assert tuple(result["step"] for result in results) == CHECKPOINTS
    alone = evaluate(str(folder / "run"), config(folder, checkpoint=CHECKPOINTS[0], pictures=0))
    assert alone["retrieval"] == results[0]["retrieval"]
    (listed,) = evaluations(str(folder / "run"), config(folder, steps=(CHECKPOINTS[0],), pictures=0))
    assert listed["zero_shot"] == alone["zero_shot"]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_several(results))
    text = console.export_text()
    assert all(str(step) in text for step in CHECKPOINTS)
    facts = write_report(load_run(open_store(str(folder / "run"))), tmp_path / "report.html")
    assert {found["step"] for found in facts["evaluations"]} == set(CHECKPOINTS)
    assert "Evaluations by step" in (tmp_path / "report.html").read_text()
    with pytest.raises(ObjectNotFound, match="step 99"):
        list(evaluations(str(folder / "run"), config(folder, steps=(6, 99))))
    with pytest.raises(ValueError, match="one of checkpoint, steps and every"):
        config(folder, every=True, checkpoint=6)


def test_scores_are_drawn_and_written(folder: Path, tmp_path: Path):
    results = list(evaluations(str(folder / "run"), config(folder, every=True, pictures=0)))
    for number, some in enumerate((results[:1], results)):
        written = write_scores(some, tmp_path / str(number))
        with Image.open(written[0]) as image:
            assert min(image.size) > 200
        assert json.loads(Path(written[1]).read_text()) == some
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="give another output"):
        write_scores(results, tmp_path / "file")


def test_learnt_tasks_and_patches_of_a_data_set(folder: Path):
    tasks = ("knn", "masked")
    result = evaluate(str(folder / "run"), config(folder, tasks=tasks, train=str(folder / "data")))
    assert result["tasks"] == list(tasks)
    assert result["knn"]["top1"] == 1.0  # every image is in the training split, and nearest to itself
    assert result["knn"]["classes"] == SAMPLES
    assert result["masked"]["cosine"] <= 1
    assert stored(folder, "step-000000012-*-knn+masked.json")["knn"] == result["knn"]
    assert load_history(open_store(str(folder / "run"))).evaluations[-1].facts["knn_top1"] == 1.0
    with pytest.raises(ValueError, match="set train or change tasks"):
        config(folder, tasks=("knn",))


def test_every_evaluation_keeps_its_event_and_the_trainers(folder: Path):
    run = open_store(str(folder / "run"))
    before = load_history(run)
    for _ in range(2):
        evaluate(str(folder / "run"), config(folder))
    after = load_history(run)
    assert len(after.evaluations) == len(before.evaluations) + 2
    assert (after.attempts, after.steps) == (before.attempts, before.steps)


def test_class_names_and_templates_come_from_files(folder: Path, tmp_path: Path):
    (tmp_path / "names.txt").write_text("picture number 3\npicture number 10\nsomething else\n")
    (tmp_path / "templates.txt").write_text("this is {}\n")
    files = {"class_names": str(tmp_path / "names.txt"), "templates": str(tmp_path / "templates.txt")}
    with pytest.raises(DataError, match=r"no image of the class 'something else'.*empty_classes=allow"):
        evaluate(str(folder / "run"), config(folder, **files))
    files["empty_classes"] = "allow"
    result = evaluate(str(folder / "run"), config(folder, **files))["zero_shot"]
    assert (result["classes"], result["templates"]) == (3, 1)
    assert (result["images"], result["images_without_class"]) == (2, 9)


def test_mistakes_are_one_clear_error(folder: Path, tmp_path: Path):
    run = str(folder / "run")
    with pytest.raises(ObjectNotFound, match="not a run folder"):
        evaluate(str(tmp_path / "nothing"), config(folder))
    with pytest.raises(ObjectNotFound, match="no committed checkpoint at step 99"):
        evaluate(run, config(folder, checkpoint=99))
    with pytest.raises(ObjectNotFound, match="not a committed dataset"):
        evaluate(run, config(folder, data=str(tmp_path / "nothing")))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.txt: the file is empty"):
        evaluate(run, config(folder, class_names=str(tmp_path / "empty.txt")))
    (tmp_path / "other.txt").write_text("zebra\n")
    with pytest.raises(DataError, match=r"other\.txt: none of its class names"):
        evaluate(run, config(folder, class_names=str(tmp_path / "other.txt")))
    with pytest.raises(ConfigError, match="class_names="):
        evaluate(run, config(folder, class_names=str(tmp_path / "absent.txt")))
    with pytest.raises(ValueError, match="change batch"):
        config(folder, batch=0)


def test_empty_data_set_and_foreign_folder_are_errors(folder: Path, tmp_path: Path):
    store = open_store(str(tmp_path / "empty"))
    counts = {"rows_in": 0, "kept": 0, "dropped": 0}
    meta = {"format": "tar", "shards": [], "recipe": {}, "counts": counts}
    commit(store, Manifest(DATASET_KIND, DATASET_VERSION, (), meta))
    with pytest.raises(DataError, match="empty"):
        evaluate(str(folder / "run"), config(folder, data=str(tmp_path / "empty")))
    with pytest.raises(ManifestMismatch, match="holds a checkpoint, not a dataset"):
        evaluate(str(folder / "run"), config(folder, data=str(folder / "run/checkpoints/step-000000006")))


def test_a_checkpoint_with_nan_is_an_error_and_stores_nothing(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    step = tmp_path / "run/checkpoints/step-000000012"
    _, manifest = open_checkpoint(open_store(str(tmp_path / "run")), 12)
    tensors = load_file(step / "rank-00001.safetensors")
    name = next(name for name in tensors if name.startswith("master/image_projection.weight"))
    tensors[name][0] = float("nan")
    save_file(tensors, step / "rank-00001.safetensors")
    entries = tuple(file_entry(step / entry.name, entry.name) for entry in manifest.files)
    (step / "manifest.json").unlink()
    commit(open_store(str(step)), sealed(replace(manifest, files=entries)))
    with pytest.raises(NonFinite, match="11 of 11 image embeddings"):
        evaluate(str(tmp_path / "run"), config(folder))
    assert not (tmp_path / "run/evaluations").exists()
