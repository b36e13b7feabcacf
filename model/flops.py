"""Floating-point operations of one training step, by formula, and parameter counts.

A multiply-add counts 2, only matrix products count (as in published MFU figures), causal attention in full.
Backward costs twice the forward; the teacher has none. Recomputation is not counted.
"""

from dataclasses import dataclass

import torch

from model.blocks import MLP_RATIO
from model.config import ModelConfig
from model.objective import Objective


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Forward FLOPs of one image-text pair, by part."""

    vision: float
    """Student, all patches, with its projection."""
    vision_visible: float
    """Student, visible patches only."""
    text: float
    """Caption, with its projection."""
    text_masked: float
    """Masked caption."""
    image_decoder: float
    """Image decoder and the student's quantizer at masked patches."""
    text_decoder: float
    """Text decoder and the vocabulary at hidden words."""
    teacher: float
    """Teacher, all patches, and its quantizer at masked patches."""

    @property
    def forward(self) -> float:
        """One forward of everything."""
        return self._student + self.teacher

    @property
    def training(self) -> float:
        """Forward and backward of the student, forward of the teacher."""
        return 3 * self._student + self.teacher

    @property
    def _student(self) -> float:
        vision, text = self.vision + self.vision_visible, self.text + self.text_masked
        return vision + text + self.image_decoder + self.text_decoder


def _transformer(width: int, layers: int, tokens: float) -> float:
    # qkv 3, output 1, MLP 2 x ratio squares of the width; two products of tokens x tokens.
    weights = (4 + 2 * MLP_RATIO) * width**2
    return layers * (2 * tokens * weights + 4 * tokens**2 * width)


def flops_per_pair(config: ModelConfig, caption_tokens: float, hidden_words: float) -> StepFlops:
    """FLOPs of one pair, without the contrastive products (2 * global batch * embed_dim a pair, four times in
    a step).

    Args:
        caption_tokens: columns that the captions of a batch are cut to.
        hidden_words: mean number of words per caption that MLM predicts.
    """
    vision, text, distill, mlm = config.vision, config.text, config.distill, config.mlm
    patches, visible = vision.num_patches, config.num_visible
    masked = patches - visible

    def encode_image(kept: int) -> float:
        embedding = 2 * kept * 3 * vision.patch_size**2 * vision.width
        return embedding + _transformer(vision.width, vision.layers, 1 + kept)

    hidden, bottleneck = distill.head_hidden, distill.head_bottleneck
    head = vision.width * hidden + hidden**2 + hidden * bottleneck + bottleneck * distill.codewords
    quantizer = 2.0 * masked * head * (distill.target == "codewords")
    outputs = {"codewords": 0, "features": vision.width, "pixels": vision.patch_values}[distill.target]
    predictor = 2.0 * masked * vision.width * outputs
    decoder = _transformer(vision.width, distill.decoder_layers, 1 + patches)
    words = 2 * hidden_words * text.width * (text.width + text.vocab_size)
    encode_text = _transformer(text.width, text.layers, caption_tokens)
    distilling, predicting = float(distill.weight > 0), float(mlm.weight > 0)
    return StepFlops(
        vision=encode_image(config.num_kept) + 2 * vision.width * config.embed_dim,
        vision_visible=distilling * encode_image(visible),
        text=encode_text + 2 * text.width * config.embed_dim,
        text_masked=predicting * encode_text * (mlm.text_pass == "own"),
        image_decoder=distilling * (decoder + quantizer + predictor),
        text_decoder=predicting * (_transformer(text.width, mlm.decoder_layers, caption_tokens) + words),
        teacher=float(distill.needs_teacher) * (encode_image(patches) + quantizer),
    )


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Trained parameters by part (first component of their name); allocates nothing."""
    counts: dict[str, int] = {}
    with torch.device("meta"):
        parameters = dict(Objective(config, seed=0).named_parameters())
    for name, parameter in parameters.items():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts
