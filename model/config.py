"""Shape of the model and of its two masked branches, and the presets that fill it in.

A recipe names a preset and changes what it wants: ``model: {preset: vit_b_16, distill: {weight: 0.1}}``.
``resolve`` lays such a section over its preset before the section is validated, so a `ModelConfig` is always
complete and the saved config of a run stands on its own.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

DEFAULT_PRESET = "tiny"

Activation = Literal["gelu", "quick_gelu"]
Layout = Literal["maskclip", "hugging_face", "open_clip"]
"""Whose names and shapes weights have; `model/convert.py` goes from one to the other."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_weight(name: str, value: float) -> None:
    _require(0 <= value < math.inf, f"{name} is {value}: set it to 0 or more, and finite")


def _check_transformer(name: str, width: int, layers: int, heads: int) -> None:
    _require(layers >= 1, f"{name}.layers is {layers}: set it to 1 or more")
    _require(heads >= 1, f"{name}.heads is {heads}: set it to 1 or more")
    _require(
        width >= 8 and width % heads == 0 and (width // heads) % 8 == 0,
        f"{name}.width {width} over {heads} heads: set width to a multiple of 8 x {name}.heads",
    )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Vision transformer. MaskCLIP: ViT-B/16 at 224 pixels (12 layers x 768 x 12 heads)."""

    image_size: int
    """Side of the square input in pixels."""
    patch_size: int
    """Side of one patch in pixels."""
    width: int
    """Width of the residual stream."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads of each block."""
    activation: Activation = "gelu"
    """Of the MLPs; quick_gelu only for weights that were trained with it, such as OpenAI's."""
    layer_scale: float = 0.0
    """Initial value of a learned factor on each residual branch (CaiT); 0: none (not from the paper)."""
    stochastic_depth: float = 0.0
    """Chance that a sample skips a branch of the last block, rising linearly from 0 at the first; keyed by
    sample, scaled to keep the mean (not from the paper)."""
    patch_dropout: float = 0.0
    """Share of the patches that the contrastive pass leaves out, keyed by sample (FLIP; not from the
    paper)."""

    def __post_init__(self) -> None:
        _check_transformer("model.vision", self.width, self.layers, self.heads)
        _check_weight("model.vision.layer_scale", self.layer_scale)
        for name in ("stochastic_depth", "patch_dropout"):
            _require(
                0 <= getattr(self, name) < 1,
                f"{name} {getattr(self, name)}: set model.vision.{name} from 0 to below 1",
            )
        _require(
            self.patch_size >= 1
            and self.image_size >= 2 * self.patch_size
            and self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} does not hold patches of {self.patch_size}: "
            "set model.vision.image_size to a multiple (2 or more) of model.vision.patch_size",
        )

    @property
    def num_patches(self) -> int:
        """Patches of one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: three channels of its pixels."""
        return 3 * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text transformer, causal as CLIP's. MaskCLIP: 12 layers x 512 (heads as in CLIP: 8)."""

    context_length: int = 77
    """Longest caption in tokens, start and end tokens included."""
    vocab_size: int = 49408
    """Words of the tokenizer; the last two are the start and the end token."""
    width: int
    """Width of the residual stream."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads of each block."""
    activation: Activation = "gelu"
    """Of the MLPs; quick_gelu only for weights that were trained with it, such as OpenAI's."""

    def __post_init__(self) -> None:
        _check_transformer("model.text", self.width, self.layers, self.heads)
        _require(
            self.context_length >= 3,
            f"context_length {self.context_length} holds no word: set model.text.context_length to 3+",
        )
        _require(
            self.vocab_size >= 4,
            f"vocab_size {self.vocab_size} is too small: set model.text.vocab_size to 4 or more",
        )

    @property
    def start_token(self) -> int:
        """Token that begins every caption."""
        return self.vocab_size - 2

    @property
    def end_token(self) -> int:
        """Token that ends every caption; its state is the caption's feature."""
        return self.vocab_size - 1

    @property
    def mask_token(self) -> int:
        """Id that stands for a hidden word; one past the vocabulary, never a target (not from the paper)."""
        return self.vocab_size


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Masked self-distillation of the image encoder. The quantizer's sizes are iBOT's, not from the paper."""

    weight: float = 0.05
    """Weight lambda of the term (Eq. 8); 0 switches the branch off and its parameters are not created."""
    target: Literal["codewords", "features", "pixels"] = "codewords"
    """What is predicted at a masked patch: the teacher's soft codewords (the paper's method), its features
    (affine-free layer norm, squared error; as the authors' BootMAE) or the pixels (MAE: normalised by patch).
    With features and teacher.momentum_* 0 the target is the student of the step before (paper, Table 9)."""
    mask_ratio: float = 0.75
    """Share of patches that the student does not see."""
    decoder_layers: int = 1
    """Blocks of the image decoder (same width and heads as the encoder; width not from the paper)."""
    codewords: int = 8192
    """Codewords K of the online quantizer (not from the paper: iBOT)."""
    head_hidden: int = 2048
    """Hidden width of the quantizer's MLP (not from the paper: iBOT)."""
    head_bottleneck: int = 256
    """Width of the unit vectors that are compared with the codewords (not from the paper: iBOT)."""
    student_temperature: float = 0.1
    """Temperature of the student's soft codewords (not from the paper: iBOT)."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher's soft codewords at the first step (not from the paper: iBOT)."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's soft codewords after its warm-up (not from the paper: iBOT)."""
    centre_momentum: float = 0.9
    """Momentum of the mean that is subtracted from the teacher's logits (not from the paper: iBOT)."""

    def __post_init__(self) -> None:
        _check_weight("model.distill.weight", self.weight)
        _require(
            0 < self.mask_ratio < 1,
            f"mask_ratio {self.mask_ratio}: set model.distill.mask_ratio above 0 and below 1",
        )
        for name in ("decoder_layers", "head_hidden", "head_bottleneck"):
            _require(
                getattr(self, name) >= 1,
                f"{name} is {getattr(self, name)}: set model.distill.{name} to 1 or more",
            )
        _require(
            self.codewords >= 2, f"codewords is {self.codewords}: set model.distill.codewords to 2 or more"
        )
        for name in ("student_temperature", "teacher_temperature_start", "teacher_temperature"):
            _require(
                0 < getattr(self, name) < math.inf,
                f"{name} is {getattr(self, name)}: set model.distill.{name} above 0",
            )
        _require(
            0 <= self.centre_momentum < 1,
            f"centre_momentum {self.centre_momentum}: set model.distill.centre_momentum from 0 to below 1",
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether there is an EMA teacher to keep."""
        return self.weight > 0 and self.target != "pixels"


@dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """Masked language modelling on the captions (BERT style, text only)."""

    weight: float = 0.05
    """Weight beta of the term (Eq. 8); 0 switches the branch off and its parameters are not created."""
    text_pass: Literal["own", "shared"] = "own"
    """own: caption and masked caption are both encoded. shared: only the masked one, for both losses, which
    is cheaper, but the contrast then sees hidden words (the paper does not say which)."""
    mask_ratio: float = 0.2
    """Share of a caption's words that are predicted; at least one."""
    decoder_layers: int = 4
    """Blocks of the text decoder (same width and heads as the encoder; width not from the paper)."""

    def __post_init__(self) -> None:
        _check_weight("model.mlm.weight", self.weight)
        _require(
            0 < self.mask_ratio <= 1,
            f"mask_ratio {self.mask_ratio}: set model.mlm.mask_ratio above 0 and at most 1",
        )
        _require(
            self.decoder_layers >= 1,
            f"decoder_layers is {self.decoder_layers}: set model.mlm.decoder_layers to 1 or more",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model. Build one with `preset`, or from a recipe's section with `resolve`."""

    preset: str
    """Name of the preset that this config began from."""
    embed_dim: int
    """Width of the shared image-text space."""
    vision: VisionConfig
    """Image encoder."""
    text: TextConfig
    """Text encoder."""
    distill: DistillConfig
    """Masked self-distillation."""
    mlm: MlmConfig
    """Masked language modelling."""
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    """Loss over the pairs of the global batch: CLIP's in both directions (the paper's), or SigLIP's."""
    attention: Literal["auto", "xformers", "sdpa", "math"] = "auto"
    """Attention kernel: auto takes xformers on CUDA where it is installed, plain products in bf16 on the CPU,
    PyTorch's SDPA elsewhere; math is plain products, deterministic everywhere."""
    recompute_every: int = 0
    """Backward computes every n-th block again instead of keeping its activations; 1: all of them, 0: none of
    them."""

    def __post_init__(self) -> None:
        _require(self.embed_dim >= 1, f"embed_dim is {self.embed_dim}: set model.embed_dim to 1 or more")
        _require(
            self.recompute_every >= 0,
            f"recompute_every is {self.recompute_every}: set model.recompute_every to 0 or more",
        )
        visible = self.num_visible
        _require(
            0 < visible < self.vision.num_patches,
            f"{visible} of {self.vision.num_patches} patches stay visible: change model.distill.mask_ratio",
        )

    @property
    def num_visible(self) -> int:
        """Patches that the student sees in its masked pass."""
        return round(self.vision.num_patches * (1 - self.distill.mask_ratio))

    @property
    def num_kept(self) -> int:
        """Patches of the contrastive pass; at least one."""
        return max(1, round(self.vision.num_patches * (1 - self.vision.patch_dropout)))


def _section(
    vision: tuple[int, int, int, int, int],
    text: tuple[int, int, int],
    embed_dim: int,
    distill: dict[str, int] | None = None,
    mlm: dict[str, int] | None = None,
) -> dict[str, Any]:
    """A preset as a recipe would write it (vision: image, patch, width, layers, heads; text: last three)."""
    return {
        "embed_dim": embed_dim,
        "vision": dict(zip(("image_size", "patch_size", "width", "layers", "heads"), vision, strict=True)),
        "text": dict(zip(("width", "layers", "heads"), text, strict=True)),
        "distill": distill or {},
        "mlm": mlm or {},
    }


# vit_b_16 is the paper's model; vit_tiny and vit_s_16 are DeiT's shapes, the others OpenAI's and OpenCLIP's.
_PRESETS: dict[str, dict[str, Any]] = {
    "test": _section(
        (32, 8, 64, 2, 2),
        (64, 2, 2),
        64,
        {"codewords": 64, "head_hidden": 128, "head_bottleneck": 32},
        {"decoder_layers": 1},
    ),
    "tiny": _section(
        (64, 8, 192, 6, 3),
        (192, 6, 3),
        192,
        {"codewords": 512, "head_hidden": 384, "head_bottleneck": 64},
        {"decoder_layers": 2},
    ),
    "vit_tiny": _section((224, 16, 192, 12, 3), (256, 12, 4), 256, {"codewords": 1024, "head_hidden": 768}),
    "vit_s_16": _section((224, 16, 384, 12, 6), (512, 12, 8), 512),
    "vit_b_32": _section((224, 32, 768, 12, 12), (512, 12, 8), 512),
    "vit_b_16": _section((224, 16, 768, 12, 12), (512, 12, 8), 512),
    "vit_l_14": _section((224, 14, 1024, 24, 16), (768, 12, 12), 768),
    "vit_h_14": _section((224, 14, 1280, 32, 16), (1024, 24, 16), 1024),
}

PRESETS = tuple(_PRESETS)


def _laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def _preset_section(name: object) -> dict[str, Any]:
    if not isinstance(name, str) or name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}: set model.preset to one of {', '.join(PRESETS)}")
    return _PRESETS[name]


def preset(name: str) -> ModelConfig:
    """The complete config of a preset.

    Raises:
        ValueError: no preset has that name.
    """
    section = _preset_section(name)
    return ModelConfig(
        preset=name,
        embed_dim=section["embed_dim"],
        vision=VisionConfig(**section["vision"]),
        text=TextConfig(**section["text"]),
        distill=DistillConfig(**section["distill"]),
        mlm=MlmConfig(**section["mlm"]),
    )


def resolve(section: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's `model` section with everything it does not say filled in from its preset.

    Works on plain data, before validation: keys that no config knows pass through for the validator to name.
    Resolving twice changes nothing.

    Args:
        section: what the recipe says, e.g. ``{"preset": "vit_b_16", "distill": {"weight": 0.1}}``.

    Raises:
        ValueError: no preset has the name that ``section["preset"]`` gives.
    """
    name = section.get("preset", DEFAULT_PRESET)
    _preset_section(name)
    return _laid_over(asdict(preset(name)), section)
