"""The encoders in other libraries' layouts: Hugging Face's `CLIPModel` and open_clip's `CLIP`, both ways.

What differs besides names: theirs convolve patches and we multiply them (the same numbers, another shape);
Hugging Face splits query, key and value; open_clip transposes projections; a bias on keys changes no softmax,
so ours has none; LayerScale is folded into the layer before it; another normalisation of pixels is folded
into the patch embedding and the positions. Features are equal to rounding, which tests check against both
libraries.

Shapes: D width, E shared space, P patches, p side of a patch.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.blocks import MLP_RATIO
from model.config import Layout, ModelConfig
from model.objective import MaskClip
from model.vision import IMAGE_MEAN, IMAGE_STD

Get = Callable[[str], Tensor]

# What OpenAI's and most of open_clip's models expect of pixels.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BLOCK = re.compile(r"(.*transformer\.blocks)\.(\d+)\.(\w+)\.(weight|bias)")
_OURS_ONLY = re.compile(r"text\.mask_embedding|.*\.(attention|mlp)_scale")

_STEMS: dict[Layout, dict[str, str]] = {
    "open_clip": {
        "vision.patch_embedding": "visual.conv1",
        "vision.class_embedding": "visual.class_embedding",
        "vision.positions": "visual.positional_embedding",
        "vision.input_norm": "visual.ln_pre",
        "vision.transformer.norm": "visual.ln_post",
        "vision.transformer.blocks": "visual.transformer.resblocks",
        "image_projection.weight": "visual.proj",
        "text.token_embedding": "token_embedding",
        "text.positions": "positional_embedding",
        "text.transformer.norm": "ln_final",
        "text.transformer.blocks": "transformer.resblocks",
        "text_projection.weight": "text_projection",
    },
    "hugging_face": {
        "vision.patch_embedding": "vision_model.embeddings.patch_embedding",
        "vision.class_embedding": "vision_model.embeddings.class_embedding",
        "vision.positions": "vision_model.embeddings.position_embedding.weight",
        "vision.input_norm": "vision_model.pre_layrnorm",
        "vision.transformer.norm": "vision_model.post_layernorm",
        "vision.transformer.blocks": "vision_model.encoder.layers",
        "image_projection": "visual_projection",
        "text.token_embedding": "text_model.embeddings.token_embedding",
        "text.positions": "text_model.embeddings.position_embedding.weight",
        "text.transformer.norm": "text_model.final_layer_norm",
        "text.transformer.blocks": "text_model.encoder.layers",
    },
}
_IN_BLOCK: dict[Layout, dict[str, str]] = {
    "open_clip": {
        "attention_norm": "ln_1.{}",
        "attention_qkv": "attn.in_proj_{}",
        "attention_out": "attn.out_proj.{}",
        "mlp_norm": "ln_2.{}",
        "mlp_in": "mlp.c_fc.{}",
        "mlp_out": "mlp.c_proj.{}",
    },
    "hugging_face": {
        "attention_norm": "layer_norm1.{}",
        "attention_qkv": "self_attn.q_proj.{0} self_attn.k_proj.{0} self_attn.v_proj.{0}",
        "attention_out": "self_attn.out_proj.{}",
        "mlp_norm": "layer_norm2.{}",
        "mlp_in": "mlp.fc1.{}",
        "mlp_out": "mlp.fc2.{}",
    },
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a layout; `make` builds it from our parameters, fetched by name one at a time."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[Get], Tensor]


def exported(config: ModelConfig, layout: Layout) -> Iterator[Entry]:
    """Every tensor of the inference model in `layout`, so that it can be written without holding it all."""
    for name, shape in _shapes(config).items():
        if layout == "maskclip":
            yield Entry(name, shape, lambda get, name=name: get(name))
        elif not _OURS_ONLY.fullmatch(name):
            theirs = _their_names(name, layout)
            for part, their_name in enumerate(theirs):

                def make(get: Get, name: str = name, part: int = part, parts: int = len(theirs)) -> Tensor:
                    value = _theirs(name, _unscaled(name, get, config), config, layout)
                    return value.chunk(parts)[part] if parts > 1 else value

                yield Entry(their_name, _their_shape(name, shape, config, layout, len(theirs)), make)


def imported(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    layout: Layout,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> dict[str, Tensor]:
    """Our parameters (fp32) from another library's, with positions resized to `config`'s grid.

    Args:
        state: their tensors by name; further ones are ignored.
        config: our model. Its shapes, heads and activations must be theirs. Of what only we have,
            LayerScale's factors become 1 and the rest is left out.
        mean: of the pixels in [0, 1] that their model was trained on, by channel.
        std: likewise.

    Raises:
        ValueError: a tensor is missing or has another shape; names it and both shapes.
    """
    ours: dict[str, Tensor] = {}
    for name, shape in _shapes(config).items():
        if name not in state and (name == "logit_bias" or _OURS_ONLY.fullmatch(name)):
            if name.startswith("vision."):
                ours[name] = torch.ones(shape)
            continue
        names = (name,) if layout == "maskclip" else _their_names(name, layout)
        missing = [their_name for their_name in names if their_name not in state]
        if missing:
            raise ValueError(f"{missing[0]} is missing, which {name} is made of")
        parts = [state[their_name].float() for their_name in names]
        value = _ours(name, torch.cat(parts) if len(parts) > 1 else parts[0], config, layout)
        if value.shape != shape:
            raise ValueError(f"{names[0]} gives {name} the shape {tuple(value.shape)}, the model has {shape}")
        ours[name] = value
    if layout != "maskclip":
        _fold_normalisation(ours, config, mean, std)
    return ours


def layout_of(names: set[str]) -> Layout | None:
    """The layout that a file with these tensor names has."""
    marks: dict[str, Layout] = {
        "vision.patch_embedding.weight": "maskclip",
        "visual.conv1.weight": "open_clip",
        "vision_model.embeddings.patch_embedding.weight": "hugging_face",
    }
    return next((layout for mark, layout in marks.items() if mark in names), None)


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """Content of `config.json` for `transformers.CLIPModel`."""

    def tower(width: int, layers: int, heads: int, activation: str) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": MLP_RATIO * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
            "projection_dim": config.embed_dim,
        }

    vision, text = config.vision, config.text
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "vision_config": tower(vision.width, vision.layers, vision.heads, vision.activation)
        | {"image_size": vision.image_size, "patch_size": vision.patch_size, "num_channels": 3},
        "text_config": tower(text.width, text.layers, text.heads, text.activation)
        | {
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": text.start_token,
            "eos_token_id": text.end_token,
            "pad_token_id": 0,
        },
    }


def open_clip_config(config: ModelConfig) -> dict[str, Any]:
    """Content of `open_clip_config.json`: `model_cfg` for `open_clip.model.CLIP`, and the preprocessing."""
    vision, text = config.vision, config.text
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": vision.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.width,
            "layers": vision.layers,
            "head_width": vision.width // vision.heads,
        },
        "text_cfg": {
            name: getattr(text, name) for name in ("context_length", "vocab_size", "width", "heads", "layers")
        },
    }
    if config.contrastive == "sigmoid":
        model["init_logit_bias"] = -10.0
    return {"model_cfg": model, "preprocess_cfg": {"mean": list(IMAGE_MEAN), "std": list(IMAGE_STD)}}


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MaskClip(config, seed=0).named_parameters()}


def _their_names(name: str, layout: Layout) -> tuple[str, ...]:
    stems = _STEMS[layout]
    if block := _BLOCK.fullmatch(name):
        tower, number, layer, kind = block.groups()
        inside = _IN_BLOCK[layout][layer].format(kind).split()
        return tuple(f"{stems[tower]}.{number}.{layer_name}" for layer_name in inside)
    stem = next((stem for stem in stems if name == stem or name.startswith(f"{stem}.")), None)
    return (name if stem is None else stems[stem] + name.removeprefix(stem),)


def _theirs(name: str, value: Tensor, config: ModelConfig, layout: Layout) -> Tensor:
    if name == "vision.patch_embedding.weight":
        side = config.vision.patch_size
        return value.view(len(value), 3, side, side)
    if name in ("logit_scale", "logit_bias"):
        return value.view(())
    if layout == "open_clip" and name in ("image_projection.weight", "text_projection.weight"):
        return value.T
    return value


def _ours(name: str, value: Tensor, config: ModelConfig, layout: Layout) -> Tensor:
    if name == "vision.patch_embedding.weight":
        return value.flatten(1)
    if name in ("logit_scale", "logit_bias"):
        return value.reshape(-1)
    if layout == "open_clip" and name in ("image_projection.weight", "text_projection.weight"):
        return value.T
    if name == "vision.positions":
        return resized_positions(value, config.vision.num_patches)
    if name.endswith("attention_qkv.bias"):
        query_D, key_D, value_D = value.chunk(3)
        return torch.cat([query_D, torch.zeros_like(key_D), value_D])
    return value


def _their_shape(
    name: str, shape: tuple[int, ...], config: ModelConfig, layout: Layout, parts: int
) -> tuple[int, ...]:
    whole = _theirs(name, torch.empty(shape, device="meta"), config, layout).shape
    return tuple(whole) if parts == 1 else (whole[0] // parts, *whole[1:])


def _unscaled(name: str, get: Get, config: ModelConfig) -> Tensor:
    """Our parameter, with the factor of LayerScale on what follows multiplied in."""
    value = get(name)
    block = _BLOCK.fullmatch(name)
    if block and name.startswith("vision.") and config.vision.layer_scale > 0:
        tower, number, layer, kind = block.groups()
        if layer in ("attention_out", "mlp_out"):
            scale_D = get(f"{tower}.{number}.{layer.removesuffix('_out')}_scale")
            return value * (scale_D[:, None] if kind == "weight" else scale_D)
    return value


def resized_positions(positions_PD: Tensor, num_patches: int) -> Tensor:
    """[1 + P, D] positions of a square grid, class token first, bicubic to `num_patches` (square, too)."""
    grid_PD = positions_PD[1:]
    if len(grid_PD) == num_patches:
        return positions_PD
    old, new = round(len(grid_PD) ** 0.5), round(num_patches**0.5)
    if old**2 != len(grid_PD):
        raise ValueError(f"{len(grid_PD)} positions of patches are no square grid")
    grid_1DHW = grid_PD.T.reshape(1, -1, old, old)
    resized_1DHW = F.interpolate(grid_1DHW, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions_PD[:1], resized_1DHW.flatten(2)[0].T])


def _fold_normalisation(
    ours: dict[str, Tensor], config: ModelConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Let the patch embedding take pixels normalised our way where it learned on (x - mean) / std."""
    weight = ours["vision.patch_embedding.weight"]
    weight_D3F = weight.view(len(weight), 3, -1).double()
    our_mean, our_std, their_mean, their_std = (
        torch.tensor(values, dtype=torch.float64) for values in (IMAGE_MEAN, IMAGE_STD, mean, std)
    )
    offset_D = weight_D3F.sum(dim=2) @ ((our_mean - their_mean) / their_std)
    scaled_D3F = weight_D3F * (our_std / their_std)[:, None]
    ours["vision.patch_embedding.weight"] = scaled_D3F.float().view_as(weight)
    class_1D, grid_PD = ours["vision.positions"].tensor_split([1])
    ours["vision.positions"] = torch.cat([class_1D, grid_PD + offset_D.float()])
