"""Segmentation: the score against a loop, dense features against the definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError
from model.blocks import Block
from model.config import preset
from model.objective import MaskClip
from system.evaluation.encoder import Encoder, Share
from system.evaluation.patches import (
    IGNORED,
    confusion,
    dense_tokens,
    evaluate_segmentation,
    intersection_over_union,
    open_masks,
)
from tests.support.eval_sets import write_masks


@given(data=st.data(), classes=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_iou_is_that_of_a_loop(data: st.DataObject, classes: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    size = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    truth = torch.randint(0, classes, size, generator=draw)
    guess = torch.randint(0, classes, size, generator=draw)
    truth[torch.rand(size, generator=draw) < 0.3] = IGNORED
    iou = intersection_over_union(confusion(guess, truth, classes))
    for label in range(classes):
        pairs = [
            (int(t), int(g)) for t, g in zip(truth.flatten(), guess.flatten(), strict=True) if t != IGNORED
        ]
        both = sum(pair == (label, label) for pair in pairs)
        either = sum(label in pair for pair in pairs)
        assert (bool(iou[label].isnan()) and either == 0) or float(iou[label]) == pytest.approx(both / either)


def test_a_perfect_guess_has_one():
    truth = torch.tensor([[0, 1, IGNORED], [2, 2, 4]])
    guess = truth.masked_fill(truth == IGNORED, 3)
    iou = intersection_over_union(confusion(guess, truth, 5))
    assert iou[[0, 1, 2, 4]].tolist() == [1.0] * 4
    assert bool(iou[3].isnan())  # guessed only where nothing counts


def built(seed: int = 0) -> MaskClip:
    return MaskClip(preset("test"), seed=seed).eval()


def test_value_features_are_a_last_block_without_its_attention():
    model = built()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = dense_tokens(model.vision, images, "value")
    last = model.vision.transformer.blocks[-1]
    assert isinstance(last, Block)
    inputs: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model.vision(images)
        hook.remove()
        x = inputs[0]
        width = x.shape[-1]
        normed = last.attention_norm(x)
        value = F.linear(normed, last.attention_qkv.weight[2 * width :], last.attention_qkv.bias[2 * width :])
        x = x + last.attention_out(value)
        x = x + last.mlp_out(F.gelu(last.mlp_in(last.mlp_norm(x))))
        expected = model.vision.transformer.norm(x)[:, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = dense_tokens(model.vision, images, "plain")
    assert plain.shape == found.shape
    assert not torch.allclose(plain, found, atol=1e-2)


def encoder(model: MaskClip) -> Encoder:
    return Encoder(model, model.vision, torch.device("cpu"), 4, Share())


@pytest.mark.parametrize("dense", ["value", "plain"])
def test_masks_made_of_the_models_own_answers_are_met(tmp_path: Path, dense):
    model = built()
    class_CE = F.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    names = ["a", "b", "c"]
    write_masks(tmp_path, [np.zeros((32, 32), np.uint8)] * 4, names)
    answers = []
    for pixels, _ in open_masks(str(tmp_path)).read(32):
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        with torch.no_grad():
            patches = F.normalize(model.image_projection(dense_tokens(model.vision, image, dense)), dim=-1)
            scores = (patches @ class_CE.T).transpose(1, 2).reshape(1, 3, 4, 4)
            grown = F.interpolate(scores, (32, 32), mode="bilinear", align_corners=False)[0]
        answers.append(grown.argmax(dim=0).numpy().astype(np.uint8))
    answers[0][:, :5] = IGNORED
    for number, mask in enumerate(answers):
        from PIL import Image

        Image.fromarray(mask).save(tmp_path / f"masks/{number:03d}.png")
    result = evaluate_segmentation(encoder(model), open_masks(str(tmp_path)), class_CE, dense)
    assert (result["miou"], result["pixel_accuracy"], result["images"]) == (1.0, 1.0, 4)
    assert result["interval"]["mean_image_accuracy"] == [1.0, 1.0]
    other = evaluate_segmentation(encoder(model), open_masks(str(tmp_path)), class_CE.roll(1, dims=0), dense)
    assert other["miou"] < 0.9


def test_masks_need_not_have_the_size_of_the_model(tmp_path: Path):
    write_masks(tmp_path, [np.zeros((20, 37), np.uint8)], ["a", "b"])
    class_CE = F.normalize(torch.ones(2, 64), dim=-1)
    result = evaluate_segmentation(encoder(built()), open_masks(str(tmp_path)), class_CE)
    assert result["pixel_accuracy"] == 1.0  # of equal scores the first


def test_mistakes_are_one_clear_line(tmp_path: Path):
    write_masks(tmp_path, [np.full((8, 8), 2, np.uint8)], ["a", "b"])
    with pytest.raises(DataError, match=r"masks/000\.png: a mask has one channel of class numbers below 2"):
        list(open_masks(str(tmp_path)).read(8))
    (tmp_path / "masks/000.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"masks/000\.png: no PNG"):
        list(open_masks(str(tmp_path)).read(8))
    (tmp_path / "masks/000.png").unlink()
    with pytest.raises(DataError, match=r"images/000\.jpg has no masks/000\.png"):
        open_masks(str(tmp_path))
    (tmp_path / "images/000.jpg").unlink()
    with pytest.raises(DataError, match="no images in images/"):
        open_masks(str(tmp_path))
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(DataError, match="the file is empty"):
        open_masks(str(tmp_path))


def test_an_all_ignored_set_is_no_score(tmp_path: Path):
    write_masks(tmp_path, [np.full((8, 8), IGNORED, np.uint8)], ["a"])
    with pytest.raises(DataError, match="every pixel is 255"):
        evaluate_segmentation(encoder(built()), open_masks(str(tmp_path)), torch.ones(1, 64))
