"""The same pictures in every layout are the same images with the same classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError, DataError, ObjectNotFound
from data_pipeline.image.augment import eval_view
from data_pipeline.records import Sample
from data_pipeline.upkeep.takedown import remove_samples
from system.evaluation.data import EvalSet, SetAddress
from system.evaluation.open import open_set, require_images_of_classes
from tests.support.eval_sets import write_benchmark, write_class_folders
from tests.support.small_dataset import picture, sample, write_dataset
from tests.support.small_set import write_set

SIDE = 16


def opened(root: Path, **settings) -> EvalSet:
    return open_set(SetAddress(uri=str(root), **settings))


def pixels(images: EvalSet, first: int = 0, last: int | None = None, batch: int = 2) -> torch.Tensor:
    stop = images.num_images if last is None else last
    return torch.cat(list(images.views(first, stop, SIDE, batch)))


def expected(numbers: list[int]) -> torch.Tensor:
    views = [eval_view(picture(number), SIDE) for number in numbers]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def test_class_folders(tmp_path: Path):
    write_class_folders(tmp_path, {"hot_dog": 2, "cat": 3})
    images = opened(tmp_path)
    assert (images.layout, images.class_names) == ("folder", ("cat", "hot dog"))
    assert images.label_N.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(pixels(images), expected([0, 1, 2, 3, 4]))
    assert torch.equal(pixels(images, 1, 4), expected([1, 2, 3]))


@pytest.mark.parametrize("count", [True, False])
def test_clip_benchmark(tmp_path: Path, count: bool):
    write_benchmark(tmp_path, [1, 0, 1, 2, 0], ["a", "b", "c"], count=count)
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n")
    images = opened(tmp_path)
    assert (images.layout, images.class_names) == ("webdataset", ("a", "b", "c"))
    assert images.templates == ("a photo of {}.",)
    assert images.label_N.tolist() == [1, 1, 0, 0, 2]  # tar 0 has the even pictures
    assert torch.equal(pixels(images), expected([0, 2, 4, 1, 3]))


def test_clip_benchmark_with_several_captions_per_image(tmp_path: Path):
    captions = {0: ["a dog", "an animal"], 1: ["a cat"], 2: ["a tree", "a plant", "a wood"]}
    write_benchmark(tmp_path, [0, 0, 0], [], tars=1, captions=captions)
    images = opened(tmp_path)
    assert images.captions == ("a dog", "an animal", "a cat", "a tree", "a plant", "a wood")
    assert images.image_P.tolist() == [0, 0, 1, 2, 2, 2]
    assert images.class_names == ()


@pytest.mark.parametrize("format", ["tar", "arrow"])
def test_a_data_set_of_ours(tmp_path: Path, format):
    write_dataset(str(tmp_path), [3, 2], format)
    images = opened(tmp_path)
    assert images.captions[3] == "picture number 3"
    assert images.label_N.tolist() == images.image_P.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(pixels(images), expected([0, 1, 2, 3, 4]))
    assert torch.equal(pixels(images, 2, 5, batch=8), expected([2, 3, 4]))
    by_key = opened(tmp_path, label="key")
    assert by_key.class_names == tuple(f"{number:05d}" for number in range(5))


@pytest.mark.parametrize("format", ["tar", "arrow"])
def test_classes_from_the_metadata(tmp_path: Path, format):
    kinds = ["dog", "cat", "dog", None, "bird"]
    changes = {n: {"meta": {"kind": kind, "number": n % 2}} for n, kind in enumerate(kinds)}
    write_set(tmp_path, (3, 2), format=format, changes=changes)
    images = opened(tmp_path, label="meta.kind")
    assert images.class_names == ("bird", "cat", "dog")
    assert images.label_N.tolist() == [2, 1, 2, -1, 0]
    numbered = open_set(SetAddress(uri=str(tmp_path), label="meta.number"), ["even", "odd"], "names.txt")
    assert numbered.label_N.tolist() == [0, 1, 0, 1, 0]
    named = open_set(SetAddress(uri=str(tmp_path), label="meta.kind"), ["dog", "fox"], "names.txt")
    assert named.label_N.tolist() == [0, -1, 0, -1, -1]
    with pytest.raises(DataError, match=r"label=meta\.nothing: no sample has a value"):
        opened(tmp_path, label="meta.nothing")


def test_samples_of_one_original_are_one_image(tmp_path: Path):
    original: Sample = sample(0)
    same = {number: {"sha256": original.sha256} for number in (0, 3)}
    write_set(tmp_path, (3, 2), changes=same)
    images = opened(tmp_path)
    assert images.num_images == 4
    assert images.image_P.tolist() == [0, 1, 2, 0, 3]
    assert opened(tmp_path, same_image="id").num_images == 5


def test_what_was_taken_out_is_not_evaluated(tmp_path: Path):
    write_set(tmp_path, (3, 2))
    gone = sorted(opened(tmp_path).captions, key=len)
    remove_samples(str(tmp_path), "source", ["a.tar/001"], reason="test", now=lambda: "2026-01-01")
    assert sorted(opened(tmp_path).captions, key=len) == [text for text in gone if text != gone[1]]


def test_mistakes_are_one_clear_line(tmp_path: Path):
    write_class_folders(tmp_path / "folders", {"a": 1, "b": 1})
    (tmp_path / "folders/empty").mkdir()
    with pytest.raises(DataError, match="no images in the class folder 'empty'"):
        opened(tmp_path / "folders")
    (tmp_path / "folders/empty").rmdir()
    with pytest.raises(ConfigError, match=r"has 2 classes, but n\.txt names 1; correct class_names"):
        open_set(SetAddress(uri=str(tmp_path / "folders")), ["x"], "n.txt")

    write_benchmark(tmp_path / "bench", [0, 1], ["a", "b", "c"], tars=1)
    with pytest.raises(DataError, match=r"no image of the class 'c'.*empty_classes=allow"):
        require_images_of_classes(opened(tmp_path / "bench"))
    with pytest.raises(ObjectNotFound, match="correct data or split"):
        opened(tmp_path / "bench", split="train")
    (tmp_path / "bench/classnames.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"s0000001\.cls says 1, but classnames\.txt has 1 names"):
        opened(tmp_path / "bench")
    (tmp_path / "bench/classnames.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"classnames\.txt: the file is empty"):
        opened(tmp_path / "bench")
    (tmp_path / "bench/classnames.txt").write_text("a\nb\n")
    (tmp_path / "bench/test/0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="not CLIP_benchmark's tar"):
        opened(tmp_path / "bench")

    with pytest.raises(ObjectNotFound, match="not a committed dataset"):
        opened(tmp_path / "nowhere")
    write_dataset(str(tmp_path / "data"), [2])
    with pytest.raises(ConfigError, match="label=kind: a data set has no such column"):
        opened(tmp_path / "data", label="kind")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path):
    write_class_folders(tmp_path, {"a": 2})
    (tmp_path / "a/00001.jpg").write_bytes(json.dumps({"no": "image"}).encode())
    with pytest.raises(DataError, match=r"a/00001\.jpg cannot be decoded"):
        pixels(opened(tmp_path))
