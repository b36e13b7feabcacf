"""The mean teacher: an EMA copy of the image encoder and of the quantizer, without gradient.

Shapes: B batch, M masked patches, D width, K codewords.
"""

from collections.abc import Callable, Iterable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import take_rows
from model.config import ModelConfig
from model.heads import Quantizer
from model.vision import VisionTower


class Teacher(nn.Module):
    """Sees the whole image and says what the student should predict at the masked patches.

    Its parameters bear the student's names. `centre` is the running mean of its logits; it stays fp32
    whatever the module is cast to, and is empty where features are the target.
    """

    centre: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # The values come from the student: building must not advance the caller's generator.
        with torch.random.fork_rng(devices=[]):
            self.vision = VisionTower(config.vision, config.attention)
            codewords = config.distill.target == "codewords"
            self.quantizer = Quantizer(config.vision.width, config.distill) if codewords else None
        self.register_buffer("centre", torch.zeros(config.distill.codewords if codewords else 0))
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor, masked_BM: Tensor) -> Tensor:
        """[B, 3, H, W] and places [B, M] -> fp32 [B, M, K] logits there, not centred, or [B, M, D] features
        of zero mean and unit variance."""
        tokens_BMD = take_rows(self.vision(images_BCHW)[:, 1:], masked_BM)
        if self.quantizer is None:
            return F.layer_norm(tokens_BMD.float(), tokens_BMD.shape[-1:])
        return self.quantizer(tokens_BMD)

    @torch.no_grad()
    def load_student(self, student: nn.Module) -> None:
        """Copy the student's parameters (in any precision); the start of a run. The centre is left alone."""
        values = dict(student.named_parameters())
        for name, parameter in self.named_parameters():
            parameter.copy_(values[name])

    @torch.no_grad()
    def update_centre_(self, mean_K: Tensor, momentum: float) -> None:
        """centre <- momentum * centre + (1 - momentum) * mean of the last global batch."""
        self.centre.lerp_(mean_K, 1 - momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.centre
        super()._apply(fn, recurse)
        self.centre = exact.to(device=self.centre.device)
        return self


@torch.no_grad()
def ema_update_(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """teacher <- teacher + (1 - momentum) * (student - teacher), in place.

    Meant for fp32: in bf16 the increment falls below half a unit in the last place at momentum 0.9999.
    """
    torch._foreach_lerp_(list(teacher), list(student), 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
