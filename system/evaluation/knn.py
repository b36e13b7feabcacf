"""Weighted k-nearest-neighbour classification of frozen features, as DINO evaluates (Caron et al. 2021,
arXiv 2104.14294, appendix): the k most similar training images vote with exp(cosine / temperature).

Shapes: N test images, M training images, D feature width, C classes, K neighbours.
"""

import torch
import torch.nn.functional as F

from system.evaluation.retrieval import best_matches, require_finite
from system.evaluation.scoring import classification_scores, label_ranks


def knn_votes(
    test_ND: torch.Tensor,
    train_MD: torch.Tensor,
    train_label_M: torch.Tensor,
    classes: int,
    *,
    k: int,
    temperature: float,
) -> torch.Tensor:
    """Votes for every class: fp32 [N, C]; classes without a neighbour have 0.

    Features of any length are made unit. Of more than `k` training images the k most similar vote.
    """
    similarity_NK, found_NK = best_matches(F.normalize(test_ND, dim=-1), F.normalize(train_MD, dim=-1), k)
    # The best one votes with 1: the ratios are DINO's, and a low temperature does not overflow.
    weight_NK = ((similarity_NK - similarity_NK[:, :1]) / temperature).exp()
    votes_NC = weight_NK.new_zeros(len(test_ND), classes)
    return votes_NC.scatter_add_(1, train_label_M.to(found_NK.device)[found_NK], weight_NK)


def evaluate_knn(
    test_ND: torch.Tensor,
    label_N: torch.Tensor,
    train_MD: torch.Tensor,
    train_label_M: torch.Tensor,
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
) -> dict:
    """Top-1, top-5 and mean per class of the vote.

    A class that nobody votes for is never among the first five. Raises NonFinite.
    """
    require_finite("test", test_ND)
    require_finite("training", train_MD)
    votes_NC = knn_votes(test_ND, train_MD, train_label_M, classes, k=k, temperature=temperature)
    ranks_N = label_ranks(votes_NC, label_N.to(votes_NC.device))
    return {
        "classes": classes,
        "train_images": len(train_MD),
        "k": min(k, len(train_MD)),
        "temperature": temperature,
        **classification_scores(ranks_N, label_N, classes, f"knn/{seed}"),
    }
