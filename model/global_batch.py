"""How the rows of one pass belong to the global batch: what they count, and whom their features meet.

The whole share of a rank may go through the model in one pass (`OnePass`), or in micro-batches whose
features have met all others before (`MicroBatch`; GradCache, Gao et al., 2021; not from the paper).

Shapes: B rows of the pass, E shared space.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model import contrastive
from model.losses import Collectives, mean_factors


class Features(NamedTuple):
    """All that the contrastive terms are computed from; also the gradients with respect to it."""

    image_BE: Tensor
    """Unit fp32 features."""
    text_BE: Tensor
    """Unit fp32 features of the same samples."""
    scale: Tensor
    """[1] factor on the cosines."""
    bias: Tensor | None
    """[1] added to the scaled cosines; there is one exactly with SigLIP's loss."""


class GlobalBatch(Protocol):
    """What a pass must know of the rows that it does not see."""

    def factors(self, counts_2: Tensor) -> Tensor:
        """[2] weights of the pass's samples and of their hidden words -> [2] what a weight of 1 counts in
        this rank's share of the two global means (`losses.mean_factors`)."""
        ...

    def contrast(self, features: Features, share_B: Tensor) -> dict[str, Tensor]:
        """This rank's shares of the contrastive terms (scalars); their sum has the gradient of the loss."""
        ...


class OnePass:
    """The pass sees all rows of its rank."""

    def __init__(self, comm: Collectives) -> None:
        self._comm = comm

    def factors(self, counts_2: Tensor) -> Tensor:
        return mean_factors(counts_2, self._comm)

    def contrast(self, features: Features, share_B: Tensor) -> dict[str, Tensor]:
        image_BE, text_BE, scale, bias = features
        if bias is not None:
            return {"pairs": contrastive.sigmoid(image_BE, text_BE, scale, bias, share_B, self._comm)}
        image_text, text_image = contrastive.info_nce(image_BE, text_BE, scale, share_B, self._comm)
        return {"image_text": image_text, "text_image": text_image}


class MicroBatch:
    """The pass sees some rows of its rank, and is told what the others amount to."""

    def __init__(self, factors_2: Tensor, slopes: Features) -> None:
        """
        Args:
            factors_2: `losses.mean_factors` over all rows of all ranks.
            slopes: gradient of the contrastive loss with respect to the features of these rows.
        """
        self._factors_2, self._slopes = factors_2, slopes

    def factors(self, counts_2: Tensor) -> Tensor:
        return self._factors_2

    def contrast(self, features: Features, share_B: Tensor) -> dict[str, Tensor]:
        """One term whose value means nothing and whose gradient is that of the contrastive loss."""
        products = [
            (value * slope).sum()
            for value, slope in zip(features, self._slopes, strict=True)
            if value is not None and slope is not None
        ]
        return {"contrast": torch.stack(products).sum()}
