"""A user's mistake is one clear line and the right exit code, and leaves nothing that a reader could take
for whole."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.raw_input import members, write_tar
from tests.support.runs import maskclip, train, write_recipe


def refused(code: int, *words: str | Path, says: tuple[str, ...]) -> None:
    done = maskclip(*words)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("maskclip")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in lines[0]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "nowhere.yaml"), ("nowhere.yaml", "cannot read the recipe")),
        (("train", "RECIPE", "run.stepz=5"), ("run.stepz", "unknown key")),
        (("train", "RECIPE", "run.steps=many"), ("run.steps", "valid integer", "'many'")),
        (("train", "RECIPE", "engine.zero_stage=7"), ("engine.zero_stage",)),
        (("train", "RECIPE", "data.streams=5"), ("data.global_batch", "data.streams")),
        (("train", "RECIPE", "model.preset=huge"), ("huge", "vit_b_16")),
        (("train", "RECIPE", "run.steps"), ("run.steps", "key=value")),
        (("train", "RECIPE", "data.uri=ftp://host/set"), ("ftp://host/set",)),
        (("preprocess", "RECIPE"), ("maskclip train", "maskclip preprocess")),
        (("train", "RECIPE", "data.window_shards=0"), ("data.window_shards",)),
        (("train", "RECIPE", "run.uri=x", "data.uri=x"), ("run.uri x", "data set x")),
        (("train",), ("required: recipe;", "--help")),
        (("fly",), ("fly", "--help")),
        (("evaluate", "RUN", "dato=x"), ("dato", "unknown key")),
    ],
)
def test_wrong_configuration_is_64(tmp_path, recipe, words, says):
    real = [str(recipe) if word == "RECIPE" else word for word in words]
    refused(64, *[str(tmp_path / "run") if word == "RUN" else word for word in real], says=says)
    assert not (tmp_path / "run").exists()


def test_missing_data_set_or_run_is_65(tmp_path, recipe):
    nowhere = tmp_path / "nowhere"
    refused(65, "train", recipe, f"data.uri={nowhere}", f"run.uri={tmp_path / 'run'}", says=(str(nowhere),))
    refused(65, "evaluate", nowhere, f"data={nowhere}", says=(str(nowhere),))
    refused(65, "export", nowhere, f"output={tmp_path / 'out'}", says=(str(nowhere),))
    refused(65, "report", nowhere, f"output={tmp_path / 'page.html'}", says=(str(nowhere),))
    refused(65, "checkpoint", "verify", nowhere, says=(str(nowhere),))
    refused(65, "dataset", "stats", nowhere, says=(str(nowhere),))
    assert list(tmp_path.iterdir()) == []


def preprocess_words(source: Path, output: Path) -> tuple[str | Path, ...]:
    recipe = ROOT / "configs/emoji_train_data.yaml"
    return "preprocess", recipe, f"source.uri={source}", f"output={output}"


def test_broken_tar_is_65_and_nothing_is_committed(tmp_path):
    source, output = tmp_path / "raw", tmp_path / "set"
    source.mkdir()
    whole = (ROOT / "examples/emoji/train/00000.tar").read_bytes()
    (source / "00000.tar").write_bytes(whole)
    (source / "00001.tar").write_bytes(whole[: len(whole) // 2])
    refused(65, *preprocess_words(source, output), says=("00001.tar",))
    refused(65, "dataset", "verify", output, says=("no manifest.json",))
    # The mended input is finished by the same command.
    shutil.copy(ROOT / "examples/emoji/train/00001.tar", source / "00001.tar")
    done = maskclip(*preprocess_words(source, output), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 200


def test_a_link_to_itself_and_another_archive_in_the_input_are_65(tmp_path):
    loop, other = tmp_path / "loop", tmp_path / "other"
    loop.mkdir()
    (loop / "00000.tar").symlink_to("00000.tar")
    refused(65, *preprocess_words(loop, tmp_path / "set1"), says=("00000.tar", "symbolic link"))
    other.mkdir()
    with zipfile.ZipFile(other / "00000.tar", "w") as archive:
        archive.writestr("a.jpg", b"x")
    refused(65, *preprocess_words(other, tmp_path / "set2"), says=("00000.tar", "is no tar but a zip"))


def test_no_input_and_all_rejected_are_65(tmp_path):
    empty, hopeless = tmp_path / "empty", tmp_path / "hopeless"
    empty.mkdir()
    refused(65, *preprocess_words(empty, tmp_path / "set1"), says=(str(empty),))
    hopeless.mkdir()
    write_tar(hopeless / "00000.tar", [("a.jpg", b"no picture"), ("a.txt", b"caption")])
    refused(65, *preprocess_words(hopeless, tmp_path / "set2"), says=("empty", "not_an_image"))
    assert not (tmp_path / "set2/manifest.json").exists()


def test_a_giant_image_is_rejected_by_name_and_the_rest_is_kept(tmp_path):
    from PIL import Image

    source, output = tmp_path / "raw", tmp_path / "set"
    Image.new("RGB", (14000, 14000)).save(tmp_path / "giant.jpg")
    giant = [("giant.jpg", (tmp_path / "giant.jpg").read_bytes()), ("giant.txt", b"a giant")]
    write_tar(source / "00000.tar", [*giant, *members("good", 1)])
    done = maskclip(*preprocess_words(source, output), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 1
    assert json.loads(done.stdout)["rejects"] == {"too_many_pixels": 1}


def test_a_corrupt_sample_ends_training_with_65_and_its_name(tmp_path, recipe, train_data):
    broken = tmp_path / "set"
    shutil.copytree(train_data, broken)
    shard = broken / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    for place in range(1024, len(data), 4096):
        data[place] ^= 0x55
    shard.write_bytes(data)
    done = maskclip("train", recipe, f"data.uri={broken}", f"run.uri={tmp_path / 'run'}")
    assert done.returncode == 65, done.stderr
    assert "shard-000001" in done.stderr
    assert "Traceback" not in done.stderr
    verified = maskclip("dataset", "verify", broken)
    assert verified.returncode == 65
    assert "shard-000001.tar" in verified.stdout


def test_a_run_keeps_its_data_set_and_its_identity(tmp_path, recipe, train_data, eval_data):
    run = tmp_path / "run"
    train(recipe, run, train_data, "run.steps=4", processes=1)
    words = ("train", recipe, f"run.uri={run}", "run.steps=4", "run.processes=1")
    refused(65, *words, f"data.uri={eval_data}", says=("manifest digest",))
    refused(66, *words, f"data.uri={train_data}", "optimizer.lr=1e-2", says=("optimizer.lr", "0.001", "0.01"))
    refused(66, *words, f"data.uri={train_data}", "model.distill.weight=0.1", says=("model.distill.weight",))
