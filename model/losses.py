"""The losses of the two masked branches, exact over the global batch, and the collectives that losses need.
The contrastive ones are in `contrastive.py`.

Every rank returns its share of a global weighted mean, times the number of ranks: the average over ranks
(what data-parallel training does to gradients) is then the exact global mean, whatever the weights.
Samples of weight 0 fill up short ranks: they are in no mean, and nobody's negatives.

Shapes: b samples of this rank, M masked patches, F values of a patch, K codewords, N hidden words,
W vocabulary.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.contrastive import Ring


class Collectives(Ring, Protocol):
    """What the objective needs from the other ranks: the ring of the contrastive losses, and sums."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks as a new tensor, detached."""
        ...


class SingleProcess:
    """Collectives of one rank."""

    size = 1

    def rotate(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()


def mean_factors(totals: Tensor, comm: Collectives) -> Tensor:
    """From the total weights of this rank's values, any shape: what a weight of 1 counts in this rank's share
    of the global means, size / global total weight."""
    whole = comm.sum(totals)
    return comm.size / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def mean_shares(weight_n: Tensor, comm: Collectives) -> Tensor:
    """What each of n values counts in this rank's share of a global mean: size * weight / total weight.

    The sum of shares * values, averaged over ranks, is the global weighted mean. Zero if all weights are.
    """
    return weight_n * mean_factors(weight_n.sum(), comm)


def teacher_targets(logits_bMK: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """Soft codewords of the teacher, softmax((logits - centre) / temperature), fp32 without gradient."""
    return torch.softmax((logits_bMK.detach() - centre_K) / temperature, dim=-1)


def distill(logits_bMK: Tensor, targets_bMK: Tensor, temperature: float, share_b: Tensor) -> Tensor:
    """L_Dist: cross-entropy between soft codewords of teacher and student, mean over masked patches.

    Args:
        logits_bMK: the student's fp32 logits at the masked patches.
        targets_bMK: the teacher's distribution at the same patches.
        temperature: the student's.
        share_b: `mean_shares` of the samples' weights.

    Returns:
        Scalar, this rank's share.
    """
    scaled_bMK = logits_bMK / temperature
    entropy_bM = scaled_bMK.logsumexp(dim=-1) - (targets_bMK * scaled_bMK).sum(dim=-1)
    return share_b @ entropy_bM.mean(dim=1)


def regression(predicted_bMF: Tensor, target_bMF: Tensor, share_b: Tensor) -> Tensor:
    """Mean squared error over masked patches and their F values, in fp32; the target gets no gradient.

    Returns:
        Scalar, this rank's share.
    """
    error_bMF = (predicted_bMF.float() - target_bMF.detach()).square()
    return share_b @ error_bMF.mean(dim=(1, 2))


def mlm(logits_NW: Tensor, words_N: Tensor, share_N: Tensor) -> Tensor:
    """L_MLM: cross-entropy of the hidden words, mean over all hidden words of the global batch.

    Args:
        logits_NW: fp32 scores of the vocabulary at the hidden words.
        words_N: the words that stood there.
        share_N: `mean_shares` of the weights of the samples that they belong to.

    Returns:
        Scalar, this rank's share.
    """
    return share_N @ F.cross_entropy(logits_NW, words_N, reduction="none")
