"""Our weights in other libraries, and theirs in ours: the same features."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import convert
from model.config import ModelConfig, preset
from model.objective import MaskClip
from model.vision import IMAGE_MEAN, IMAGE_STD
from tests.support import peers
from tests.unit.model.samples import make_config, make_tokens

BATCH = 5


def varied(config: ModelConfig) -> MaskClip:
    """A model with no special value in it (norms, biases and factors are not left at 1 and 0)."""
    model = MaskClip(config, seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            if name.endswith("attention_qkv.bias"):
                parameter.view(3, -1)[1] = 0  # keys have no bias in ours
    return model


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] and captions padded to the context length."""
    side = config.vision.image_size
    pixels = torch.rand(BATCH, 3, side, side, generator=torch.Generator().manual_seed(5))
    tokens = make_tokens([1, 4, 9, 20, 75], config, 6)
    return pixels, tokens


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=-1)


def hugging_face(config: ModelConfig) -> Any:
    library = peers.transformers()
    return library.CLIPModel(library.CLIPConfig(**convert.hugging_face_config(config))).eval()


def open_clip(config: ModelConfig) -> Any:
    settings = dict(convert.open_clip_config(config)["model_cfg"])
    return peers.open_clip().model.CLIP(**settings).eval()


def features(model: Any, pixels: Tensor, tokens: Tensor) -> list[Tensor]:
    """Unit features that the other library's model gives."""
    if hasattr(model, "get_image_features"):
        found = [model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=tokens)]
        found = [f if isinstance(f, Tensor) else f.pooler_output for f in found]
    else:
        found = [model.encode_image(pixels), model.encode_text(tokens)]
    return [unit(f) for f in found]


BUILD = {"hugging_face": hugging_face, "open_clip": open_clip}
VARIANTS = {
    "plain": lambda config: config,
    "quick_gelu": lambda config: replace(
        config,
        vision=replace(config.vision, activation="quick_gelu"),
        text=replace(config.text, activation="quick_gelu"),
    ),
    "layer_scale": lambda config: replace(config, vision=replace(config.vision, layer_scale=0.3)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", BUILD)
@torch.no_grad()
def test_exported_weights_give_the_same_features_there(layout, variant):
    config = VARIANTS[variant](make_config())
    ours = varied(config)
    parameters = dict(ours.named_parameters())
    state = {}
    for entry in convert.exported(config, layout):
        state[entry.name] = entry.make(parameters.__getitem__).clone()
        assert state[entry.name].shape == entry.shape, entry.name
    theirs = BUILD[layout](config)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [name for name in missing if not name.endswith(("position_ids", "attn_mask"))] == []
    pixels, tokens = inputs(config)
    expected = [ours.encode_image(pixels), ours.encode_text(tokens)]
    got = features(theirs, normalised(pixels, IMAGE_MEAN, IMAGE_STD), tokens)
    for left, right in zip(got, expected, strict=True):
        assert float((left - right).abs().max()) <= 1e-5
    assert float(theirs.logit_scale) == pytest.approx(float(ours.logit_scale))


@pytest.mark.parametrize("variant", ["plain", "quick_gelu"])
@pytest.mark.parametrize("layout", BUILD)
@torch.no_grad()
def test_imported_weights_give_the_same_features_here(layout, variant):
    config = VARIANTS[variant](make_config())
    theirs = BUILD[layout](config)
    generator = torch.Generator().manual_seed(7)
    for parameter in theirs.parameters():  # keys get a bias too, which must not matter
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    state = theirs.state_dict()
    assert convert.layout_of(set(state)) == layout
    ours = MaskClip(config, seed=0).eval()
    missing, unexpected = ours.load_state_dict(convert.imported(state, config, layout), strict=False)
    assert missing == ["text.mask_embedding"]
    assert unexpected == []
    pixels, tokens = inputs(config)
    expected = features(theirs, normalised(pixels, convert.CLIP_MEAN, convert.CLIP_STD), tokens)
    for left, right in zip([ours.encode_image(pixels), ours.encode_text(tokens)], expected, strict=True):
        assert float((left - right).abs().max()) <= 1e-5


@torch.no_grad()
def test_our_own_weights_come_back_whole_and_others_leave_layer_scale_at_one():
    config = VARIANTS["layer_scale"](make_config())
    ours = varied(config)
    state = {name: value.clone() for name, value in ours.named_parameters()}
    back = convert.imported(state, config, "maskclip")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    theirs = {entry.name: entry.make(state.__getitem__) for entry in convert.exported(config, "open_clip")}
    again = MaskClip(config, seed=0).eval()
    imported = convert.imported(theirs, config, "open_clip", IMAGE_MEAN, IMAGE_STD)
    missing, _ = again.load_state_dict(imported, strict=False)
    assert missing == ["text.mask_embedding"]
    pixels, tokens = inputs(config)
    assert float((again.encode_image(pixels) - ours.encode_image(pixels)).abs().max()) <= 1e-5
    assert float((again.encode_text(tokens) - ours.encode_text(tokens)).abs().max()) <= 1e-5


@torch.no_grad()
def test_positions_are_resized_to_the_grid():
    config = make_config()
    larger = replace(config, vision=replace(config.vision, image_size=2 * config.vision.image_size))
    state = {name: value.clone() for name, value in open_clip(config).state_dict().items()}
    smooth = torch.linspace(0, 1, 4)[:, None, None].expand(4, 4, config.vision.width)
    state["visual.positional_embedding"][1:] = smooth.reshape(16, -1)
    ours = convert.imported(state, larger, "open_clip", IMAGE_MEAN, IMAGE_STD)["vision.positions"]
    assert ours.shape == (1 + larger.vision.num_patches, config.vision.width)
    assert torch.equal(ours[0], state["visual.positional_embedding"][0])
    rows = ours[1:].view(8, 8, -1)
    assert torch.allclose(rows, rows[:, :1].expand_as(rows), atol=1e-6)  # constant along a row
    assert (rows[1:, 0, 0] > rows[:-1, 0, 0]).all()  # and still rising from row to row
    assert torch.equal(
        convert.imported(state, config, "open_clip", IMAGE_MEAN, IMAGE_STD)["vision.positions"],
        state["visual.positional_embedding"],
    )


PUBLISHED = {
    "vit_b_32": "ViT-B-32",
    "vit_b_16": "ViT-B-16",
    "vit_l_14": "ViT-L-14",
    "vit_h_14": "ViT-H-14",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_shapes_of_the_published_models(name: str):
    library, config = peers.open_clip(), preset(name)
    with torch.device("meta"):
        theirs = library.model.CLIP(**library.get_model_config(PUBLISHED[name]))
    shapes = {entry.name: torch.Size(entry.shape) for entry in convert.exported(config, "open_clip")}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    heads = [len(theirs.visual.transformer.resblocks), theirs.visual.transformer.resblocks[0].attn.num_heads]
    assert heads == [config.vision.layers, config.vision.heads]
    assert theirs.transformer.resblocks[0].attn.num_heads == config.text.heads


def test_weights_of_another_model_are_refused_by_name():
    config = make_config()
    state = dict(open_clip(config).state_dict())
    wider = replace(config, embed_dim=32)
    with pytest.raises(ValueError, match=r"visual\.proj gives image_projection\.weight the shape \(64, 64\)"):
        convert.imported(state, wider, "open_clip")
    positions = {"visual.positional_embedding": torch.zeros(1 + 15, config.vision.width)}
    with pytest.raises(ValueError, match="15 positions of patches are no square grid"):
        convert.imported(state | positions, config, "open_clip")
    del state["visual.ln_pre.bias"]
    with pytest.raises(ValueError, match=r"visual\.ln_pre\.bias is missing"):
        convert.imported(state, config, "open_clip")
