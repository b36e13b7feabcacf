"""The contrastive losses, exact over the global batch, in tiles: no b x B matrix and no B x E features.

The captions travel once around a ring of the ranks; each rank meets every caption with its own images, one
tile of similarities at a time. A row's log-sum-exp grows where the images stay, a column's travels with its
captions, so both directions come from one product. Backward makes the tiles again, and the gradient of a
caption travels home with it. Memory is that of b rows, whatever the number of ranks (the online log-sum-exp
is that of memory-efficient attention; the ring is not from the paper).

Shapes: b samples of this rank, B of all ranks, v visiting samples, E embedding, r x c one tile.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1024
"""Rows and columns of a tile of similarities."""


class Ring(Protocol):
    """What the losses need from the other ranks. All ranks call in the same order with the same shapes."""

    @property
    def size(self) -> int: ...

    def rotate(self, x: Tensor) -> Tensor:
        """Give x to the next rank and return the previous one's. After `size` turns everything is home."""
        ...


def info_nce(
    image_bE: Tensor, text_bE: Tensor, scale: Tensor, share_b: Tensor, ring: Ring, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """L_I and L_T: cross-entropy of each image over all captions, and of each caption over all images.

    The paper adds the two (Eq. 8), CLIP takes their mean.

    Args:
        image_bE: unit fp32 features.
        text_bE: unit fp32 features of the same samples.
        scale: [1] factor on the cosines (1 / temperature).
        share_b: `losses.mean_shares` of the samples' weights; a sample of share 0 is neither row nor column.

    Returns:
        Two scalars, this rank's shares.
    """
    return _InfoNce.apply(image_bE, text_bE, scale, share_b, ring, tile)  # type: ignore[return-value]


class _InfoNce(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, image_bE: Tensor, text_bE: Tensor, scale: Tensor, share_b: Tensor, ring: Ring, tile: int
    ) -> tuple[Tensor, Tensor]:
        none_b = torch.full_like(share_b, float("-inf"))
        rows_b = none_b.clone()
        visiting = _pack(text_bE, none_b, share_b)
        for _ in range(ring.size):
            text_vE, columns_v, share_v = _unpack(visiting, 2)
            for row, column in _tiles(len(image_bE), tile):
                logits_rc = scale * (image_bE[row] @ text_vE[column].T)
                logits_rc.masked_fill_(_absent(share_b[row], share_v[column]), float("-inf"))
                rows_b[row] = torch.logaddexp(rows_b[row], logits_rc.logsumexp(dim=1))
                columns_v[column] = torch.logaddexp(columns_v[column], logits_rc.logsumexp(dim=0))
            visiting = ring.rotate(visiting)
        columns_b = visiting[:, -2]
        ctx.ring, ctx.tile = ring, tile
        ctx.save_for_backward(image_bE, text_bE, scale, share_b, rows_b, columns_b)
        match_b = scale * (image_bE * text_bE).sum(dim=1)
        present_b = share_b != 0  # an absent sample's sums are empty: -inf, which times 0 is no number
        image_text, text_image = (
            share_b @ torch.where(present_b, sums_b - match_b, 0) for sums_b in (rows_b, columns_b)
        )
        return image_text, text_image

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image_bE, text_bE, scale, share_b, rows_b, columns_b = ctx.saved_tensors
        in_row_b, in_column_b = grads[0] * share_b, grads[1] * share_b
        grad_image_bE, grad_scale = torch.zeros_like(image_bE), torch.zeros_like(scale)
        visiting = _pack(text_bE, columns_b, in_column_b, share_b, torch.zeros_like(text_bE))
        for _ in range(ctx.ring.size):
            text_vE, columns_v, in_column_v, share_v, grad_text_vE = _unpack(visiting, 3, text_bE.shape[1])
            for row, column in _tiles(len(image_bE), ctx.tile):
                cosines_rc = image_bE[row] @ text_vE[column].T
                logits_rc = scale * cosines_rc
                slope_rc = in_row_b[row, None] * (logits_rc - rows_b[row, None]).exp()
                slope_rc += in_column_v[column] * (logits_rc - columns_v[column]).exp()
                slope_rc.masked_fill_(_absent(share_b[row], share_v[column]), 0)
                grad_scale += (slope_rc * cosines_rc).sum()
                grad_image_bE[row] += scale * (slope_rc @ text_vE[column])
                grad_text_vE[column] += scale * (slope_rc.T @ image_bE[row])
            visiting = ctx.ring.rotate(visiting)
        both_b1 = (in_row_b + in_column_b)[:, None]
        grad_text_bE = visiting[:, -text_bE.shape[1] :] - scale * both_b1 * image_bE
        grad_image_bE -= scale * both_b1 * text_bE
        grad_scale -= (both_b1 * image_bE * text_bE).sum()
        return grad_image_bE, grad_text_bE, grad_scale, None, None, None


def sigmoid(
    image_bE: Tensor,
    text_bE: Tensor,
    scale: Tensor,
    bias: Tensor,
    share_b: Tensor,
    ring: Ring,
    tile: int = TILE,
) -> Tensor:
    """SigLIP's loss (Zhai et al., 2023, Algorithm 1): every pair of the global batch is a yes or no question.

    An image counts with its weight, a caption in its terms is there or not; the sum over captions is not
    averaged, as in SigLIP. Arguments as `info_nce`; `bias` [1] is added to the scaled cosines.

    Returns:
        Scalar, this rank's share.
    """
    return _Sigmoid.apply(image_bE, text_bE, scale, bias, share_b, ring, tile)  # type: ignore[return-value]


class _Sigmoid(torch.autograd.Function):
    """The value needs no second look at a tile, so forward makes the gradient too (for the same factor on the
    loss of every rank)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image_bE: Tensor,
        text_bE: Tensor,
        scale: Tensor,
        bias: Tensor,
        share_b: Tensor,
        ring: Ring,
        tile: int,
    ) -> Tensor:
        loss, grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(scale), torch.zeros_like(bias)
        grad_image_bE = torch.zeros_like(image_bE)
        visiting = _pack(text_bE, share_b, torch.zeros_like(text_bE))
        for hop in range(ring.size):
            text_vE, share_v, grad_text_vE = _unpack(visiting, 1, text_bE.shape[1])
            for row, column in _tiles(len(image_bE), tile):
                cosines_rc = image_bE[row] @ text_vE[column].T
                sign_rc = -torch.ones_like(cosines_rc)
                if hop == 0 and row == column:
                    sign_rc.fill_diagonal_(1)
                agree_rc = sign_rc * (scale * cosines_rc + bias)
                counts_rc = share_b[row, None] * (share_v[column] != 0)
                loss -= (counts_rc * F.logsigmoid(agree_rc)).sum()
                slope_rc = -counts_rc * sign_rc * torch.sigmoid(-agree_rc)
                grad_scale += (slope_rc * cosines_rc).sum()
                grad_bias += slope_rc.sum()
                grad_image_bE[row] += scale * (slope_rc @ text_vE[column])
                grad_text_vE[column] += scale * (slope_rc.T @ image_bE[row])
            visiting = ring.rotate(visiting)
        grad_text_bE = visiting[:, -text_bE.shape[1] :].clone()
        ctx.save_for_backward(grad_image_bE, grad_text_bE, grad_scale, grad_bias)
        return loss.squeeze(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(grads[0] * own for own in ctx.saved_tensors), None, None, None


def _tiles(count: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile; every rank holds equally many samples, so visitors are as many."""
    spans = [slice(start, min(start + tile, count)) for start in range(0, count, tile)]
    return ((row, column) for row in spans for column in spans)


def _absent(row_share_r: Tensor, column_share_c: Tensor) -> Tensor:
    return (row_share_r[:, None] == 0) | (column_share_c == 0)


def _pack(*parts: Tensor) -> Tensor:
    """One fp32 tensor [b, F] to send: features [b, E] as they are, numbers [b] as columns."""
    return torch.cat([part if part.ndim == 2 else part[:, None] for part in parts], dim=1)


def _unpack(visiting_vF: Tensor, numbers: int, trailing: int = 0) -> tuple[Tensor, ...]:
    """Views: the features, `numbers` columns, and `trailing` columns of gradient if there are any."""
    width = visiting_vF.shape[1] - numbers - trailing
    columns = visiting_vF[:, width : width + numbers].unbind(dim=1)
    rest = (visiting_vF[:, width + numbers :],) if trailing else ()
    return visiting_vF[:, :width], *columns, *rest
