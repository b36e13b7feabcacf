"""Exported folders in the hands of the libraries whose layout they have: their own loaders take them, and
pictures and captions get the same features as here."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from data_pipeline.image.augment import eval_view
from data_pipeline.loading.tokenizer import EOT, SPECIAL, Tokenizer, clean
from model.config import preset
from system.export.export import ExportConfig, export, load_export
from tests.support import peers
from tests.support.paths import CLIP_TOKENS
from tests.support.small_dataset import write_dataset
from tests.support.small_run import write_run

CAPTIONS = [
    "a dog",
    "Two CATS, and 3 dogs!",
    "it's  a 1990s photo; don't",
    "naïve café – 日本 🦊",
    "word " * 90,
]
LAYOUTS = ("hugging_face", "open_clip")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("layouts")
    write_dataset(str(folder / "data"), [5])
    write_run(str(folder / "run"), str(folder / "data"))
    return str(folder / "run")


def pictures() -> list[bytes]:
    """PNGs that have the model's size, so that no library has to resize (they do it differently)."""
    side, found = preset("test").vision.image_size, []
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        found.append(file.getvalue())
    return found


@torch.no_grad()
def our_features(folder: str) -> tuple[Tensor, Tensor]:
    model, config = load_export(folder)
    views = [eval_view(picture, config["preprocessing"]["image_size"]) for picture in pictures()]
    images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    tokens = Tokenizer().encode(CAPTIONS, config["tokenizer"]["context_length"])
    return model.encode_image(images), model.encode_text(torch.from_numpy(tokens))


def hugging_face_features(folder: str) -> tuple[Tensor, Tensor]:
    library = peers.transformers()
    model, info = library.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = library.CLIPProcessor.from_pretrained(folder)
    images = [Image.open(io.BytesIO(picture)) for picture in pictures()]
    inputs = processor(text=CAPTIONS, images=images, return_tensors="pt", padding=True, truncation=True)
    assert inputs["input_ids"].shape[1] == 77
    output = model.eval()(**inputs)
    return output.image_embeds, output.text_embeds


def open_clip_features(folder: str) -> tuple[Tensor, Tensor]:
    library, name = peers.open_clip(), f"local-dir:{folder}"
    model, _, preprocess = library.create_model_and_transforms(name)
    images = torch.stack([preprocess(Image.open(io.BytesIO(picture))) for picture in pictures()])
    tokens = library.get_tokenizer(name)(CAPTIONS)
    model.eval()
    return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


FEATURES = {"hugging_face": hugging_face_features, "open_clip": open_clip_features}


@pytest.mark.parametrize("tower", ["student", "teacher"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_other_library_loads_the_folder_and_gives_the_same_features(run, tmp_path, layout, tower):
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    export(run, ExportConfig(output=ours, tower=tower))
    result = export(run, ExportConfig(output=theirs, tower=tower, layout=layout))
    assert (result["layout"], result["tower"]) == (layout, tower)
    expected = our_features(ours)
    for left, right in zip(FEATURES[layout](theirs), expected, strict=True):
        assert float((left - right).abs().max()) <= TOLERANCE
    assert float((expected[0][0] - expected[0][1]).abs().max()) > 100 * TOLERANCE  # the inputs do matter
    assert float((expected[1][0] - expected[1][1]).abs().max()) > 100 * TOLERANCE


@torch.no_grad()
def test_student_and_teacher_differ(run, tmp_path):
    for tower in ("student", "teacher"):
        export(run, ExportConfig(output=str(tmp_path / tower), tower=tower, layout="open_clip"))
    student, teacher = (open_clip_features(str(tmp_path / tower)) for tower in ("student", "teacher"))
    assert float((student[0] - teacher[0]).abs().max()) > 100 * TOLERANCE
    assert torch.equal(student[1], teacher[1])


@torch.no_grad()
def test_sigmoid_model_keeps_its_bias_in_open_clip(tmp_path):
    write_dataset(str(tmp_path / "data"), [2])
    model = replace(preset("test"), contrastive="sigmoid")
    write_run(str(tmp_path / "run"), str(tmp_path / "data"), model)
    for layout in LAYOUTS:
        export(str(tmp_path / "run"), ExportConfig(output=str(tmp_path / layout), layout=layout))
    theirs, _, _ = peers.open_clip().create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    assert float(theirs.logit_bias) == -10.0
    with safe_open(tmp_path / "hugging_face/model.safetensors", "pt") as file:
        assert float(file.get_tensor("logit_bias")) == -10.0
    assert "has no place for the bias" in (tmp_path / "hugging_face/README.md").read_text("utf-8")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_example_of_the_model_card_runs(run, tmp_path, capsys, layout):
    peers.transformers()  # what it declares about torchvision holds for the example as well
    export(run, ExportConfig(output=str(tmp_path / "out"), layout=layout))
    (tmp_path / "picture.png").write_bytes(pictures()[0])
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = code.replace("path/of/this/folder", str(tmp_path / "out"))
    names: dict[str, Any] = {}
    exec(compile(code.replace("picture.jpg", str(tmp_path / "picture.png")), "model card", "exec"), names)
    assert "tensor([[" in capsys.readouterr().out


def test_their_tokenizer_gives_our_tokens_for_clean_captions(run, tmp_path: Path):
    """Cleaning (broken encodings, HTML entities) is ours alone; words are the same."""
    export(run, ExportConfig(output=str(tmp_path), layout="hugging_face"))
    theirs = peers.transformers().AutoTokenizer.from_pretrained(str(tmp_path))
    known = json.loads(CLIP_TOKENS.read_text("utf-8"))["captions"]
    captions = [clean(caption) for caption in (*CAPTIONS, *known)]
    captions = [caption for caption in captions if not any(word in caption for word in SPECIAL)]
    assert len(captions) > 300
    ours = Tokenizer().encode(captions)
    got = theirs(captions, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    for left_L, right_L, caption in zip(got, ours, captions, strict=True):
        length = int((right_L == EOT).argmax()) + 1
        assert left_L[:length].tolist() == right_L[:length].tolist(), caption
        assert (left_L[length:] == EOT).all()
