"""What a run begins from: files of every layout give the model that was exported, and what does not fit is
refused in one line."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointIncompatible, ConfigError, DataError, ManifestMismatch, ObjectNotFound
from cluster.store import open_store
from model import convert
from model.config import ModelConfig, preset
from model.objective import MaskClip
from system.config import InitConfig, identity, load_train_recipe
from system.export.export import ExportConfig, export, load_export
from system.export.initial_weights import fill, read_weights, weights_digest
from tests.support.runs import write_recipe
from tests.support.small_dataset import flip_byte, write_dataset
from tests.support.small_run import write_run
from tests.unit.model.samples import make_tokens

CONFIG = preset("test")
THEIRS = ("hugging_face", "open_clip")
WEIGHTS = {"hugging_face": "model.safetensors", "open_clip": "open_clip_model.safetensors"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every layout, in folders named like it, and its data set."""
    folder = tmp_path_factory.mktemp("weights")
    write_dataset(str(folder / "data"), [40])
    write_run(str(folder / "run"), str(folder / "data"))
    for layout in ("maskclip", *THEIRS):
        export(str(folder / "run"), ExportConfig(output=str(folder / layout), layout=layout))
    return folder


def begin(init: InitConfig, config: ModelConfig = CONFIG) -> MaskClip:
    model = MaskClip(config, seed=99).eval()
    fill(model, read_weights(init, config))
    return model


@torch.no_grad()
def largest_difference(left: MaskClip, right: MaskClip) -> float:
    side = CONFIG.vision.image_size
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    tokens = make_tokens([3, 8, 20], CONFIG)
    differences = [
        left.encode_image(images) - right.encode_image(images),
        left.encode_text(tokens) - right.encode_text(tokens),
    ]
    return max(float(difference.abs().max()) for difference in differences)


def test_our_export_comes_back_bit_for_bit(exports: Path):
    stored = load_file(exports / "maskclip/model.safetensors")
    for uri in (exports / "maskclip", exports / "maskclip/model.safetensors"):
        read = read_weights(InitConfig(uri=str(uri)), CONFIG)
        assert read.keys() == stored.keys()
        assert all(torch.equal(read[name], stored[name]) for name in stored)


@pytest.mark.parametrize("layout", THEIRS)
def test_their_folder_gives_the_same_features(exports: Path, layout: str):
    model, _ = load_export(str(exports / "maskclip"))
    assert largest_difference(begin(InitConfig(uri=str(exports / layout))), model) <= 1e-5


@pytest.mark.parametrize("layout", THEIRS)
def test_pixels_are_as_the_recipe_says_or_as_the_folder_or_as_clips(exports, tmp_path, layout):
    model, _ = load_export(str(exports / "maskclip"))
    alone = str(shutil.copy(exports / layout / WEIGHTS[layout], tmp_path))
    ours: Any = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert largest_difference(begin(InitConfig(uri=alone, **ours)), model) <= 1e-5
    read, state = read_weights(InitConfig(uri=alone), CONFIG), load_file(alone)
    as_clip = convert.imported(state, CONFIG, layout, convert.CLIP_MEAN, convert.CLIP_STD)
    assert all(torch.equal(read[name], as_clip[name]) for name in as_clip)
    assert largest_difference(begin(InitConfig(uri=alone)), model) > 1e-3


def test_half_precision_and_a_larger_grid_are_taken(exports: Path, tmp_path: Path):
    state = {name: t.half() for name, t in load_file(exports / "open_clip" / WEIGHTS["open_clip"]).items()}
    save_file(state, tmp_path / "half.safetensors")
    larger = replace(CONFIG, vision=replace(CONFIG.vision, image_size=2 * CONFIG.vision.image_size))
    read = read_weights(InitConfig(uri=str(tmp_path / "half.safetensors")), larger)
    assert read["vision.positions"].shape == (1 + larger.vision.num_patches, CONFIG.vision.width)
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}


def test_weights_come_from_an_s3_store(exports: Path, s3_env: str):
    store = open_store(f"{s3_env}/weights")
    for path in (exports / "hugging_face").iterdir():
        store.put_file(path.name, path)
    local, remote = InitConfig(uri=str(exports / "hugging_face")), InitConfig(uri=f"{s3_env}/weights")
    left, right = read_weights(local, CONFIG), read_weights(remote, CONFIG)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert weights_digest(local) == weights_digest(remote)
    file = exports / "hugging_face/model.safetensors"
    assert weights_digest(local) == hashlib.sha256(file.read_bytes()).hexdigest()


WIDER = replace(CONFIG, embed_dim=32)
SHALLOW = replace(CONFIG, vision=replace(CONFIG.vision, layers=1))
DEEP = replace(CONFIG, text=replace(CONFIG.text, layers=3))
HEADS = replace(CONFIG, vision=replace(CONFIG.vision, heads=4))
QUICK = replace(CONFIG, text=replace(CONFIG.text, activation="quick_gelu"))


@pytest.mark.parametrize(
    ("layout", "config", "says"),
    [
        ("maskclip", WIDER, r"image_projection\.weight gives .* shape \(64, 64\), the model has \(32, 64\)"),
        (
            "open_clip",
            WIDER,
            r"visual\.proj gives image_projection\.weight the shape \(64, 64\), .* \(32, 64\)",
        ),
        ("hugging_face", WIDER, r"visual_projection\.weight gives .* \(64, 64\), the model has \(32, 64\)"),
        ("maskclip", SHALLOW, r"no place for vision\.transformer\.blocks\.1\.\S+ \(64,\) \(and 11 others\)"),
        ("open_clip", SHALLOW, r"no place for visual\.transformer\.resblocks\.1\.\S+ \(192,\)"),
        ("hugging_face", DEEP, r"text_model\.encoder\.layers\.2\.\S+ is missing, which text\.transformer"),
        *[(layout, HEADS, r"set model\.vision\.heads=2") for layout in ("maskclip", *THEIRS)],
        *[(layout, QUICK, r"set model\.text\.activation=gelu") for layout in ("maskclip", *THEIRS)],
    ],
)
def test_another_model_is_refused(exports: Path, layout: str, config: ModelConfig, says: str):
    with pytest.raises(CheckpointIncompatible, match=says):
        read_weights(InitConfig(uri=str(exports / layout)), config)


def test_what_is_no_such_file_is_refused(exports: Path, tmp_path: Path):
    def refused(error: type[Exception], says: str, name: str = "", **how: Any) -> None:
        with pytest.raises(error, match=says):
            read_weights(InitConfig(uri=str(tmp_path / name), **how), CONFIG)

    refused(ObjectNotFound, r"no \.safetensors file; give init\.uri one file or a folder")
    refused(ObjectNotFound, "no such object", "absent.safetensors")
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    refused(DataError, r"a\.safetensors: no layout that is known, its first tensor is encoder\.weight")
    (tmp_path / "b.safetensors").write_bytes(b"PK\x03\x04 a pickle, in truth")
    refused(DataError, "not a safetensors file", "b.safetensors")
    refused(ObjectNotFound, r"a\.safetensors, b\.safetensors; give init\.uri one file")
    whole = (exports / "open_clip" / WEIGHTS["open_clip"]).read_bytes()
    (tmp_path / "c.safetensors").write_bytes(whole[:-100])
    refused(DataError, r"c\.safetensors: [\d,]+ bytes, its header says [\d,]+", "c.safetensors")
    values = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    with pytest.raises(ConfigError, match=r"init\.mean and init\.std are for weights of other libraries"):
        read_weights(InitConfig(uri=str(exports / "maskclip"), **values), CONFIG)


def test_a_damaged_export_is_refused(exports: Path, tmp_path: Path):
    shutil.copytree(exports / "maskclip", tmp_path / "copy")
    flip_byte(tmp_path / "copy/model.safetensors", 50_000)
    with pytest.raises(ManifestMismatch, match="sha256 is not the manifest's"):
        weights_digest(InitConfig(uri=str(tmp_path / "copy")))


@pytest.mark.parametrize(
    "knobs", [["init.mean=[0.5,0.5,0.5]"], ["init.uri=x", "init.std=[1,1,1]"], ["init.from=x"]]
)
def test_half_a_section_is_refused(tmp_path: Path, knobs: list[str]):
    with pytest.raises(ConfigError, match="init"):
        load_train_recipe(str(write_recipe(tmp_path)), ["data.uri=x", *knobs])


def test_the_section_is_part_of_what_the_run_is(tmp_path: Path):
    recipe = str(write_recipe(tmp_path))
    pixels = ["init.mean=[0.5,0.5,0.5]", "init.std=[0.5,0.5,1]"]
    config = load_train_recipe(recipe, ["data.uri=x", "init.uri=y", *pixels])
    assert config.init == InitConfig(uri="y", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 1.0))
    assert identity(config) != identity(load_train_recipe(recipe, ["data.uri=x", "init.uri=z", *pixels]))
