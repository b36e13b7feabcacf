"""Linear probe: multinomial logistic regression on frozen features by L-BFGS, as CLIP evaluates (Radford et
al. 2021, arXiv 2103.00020, appendix A.3).

The strength of the L2 penalty is swept on a held-out part of the training split, then everything is fitted
again with the best one. Features are standardised with the training split's mean and deviation (not from
CLIP; it makes one grid serve features of any scale).

Shapes: N test images, M training images, D feature width, C classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from cluster.errors import DataError
from system.evaluation.retrieval import require_finite
from system.evaluation.scoring import classification_scores, generator, label_ranks

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MAX_ITERATIONS = 300


def fit_logistic(
    feature_MD: torch.Tensor,
    label_M: torch.Tensor,
    classes: int,
    penalty: float,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights [D + 1, C] that minimise the mean cross-entropy plus penalty / 2 times the squared weights; the
    last row is the bias, without penalty.

    Args:
        start: weights to begin from; zeros otherwise. The minimum is the same.
    """
    width = feature_MD.shape[1]
    weight = feature_MD.new_zeros(width + 1, classes) if start is None else start.clone()
    weight.requires_grad_(True)
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(logits(feature_MD, weight), label_M)
        value = value + penalty / 2 * weight[:width].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)  # pyright: ignore[reportArgumentType]
    return weight.detach()


def logits(feature_MD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return feature_MD @ weight[:-1] + weight[-1]


def held_out(label_M: torch.Tensor, share: float, key: str) -> torch.Tensor:
    """bool [M], True for about `share` of each class, at least one and never all of it; a class with a single
    image keeps it for the fit."""
    order = torch.from_numpy(generator(key).permutation(len(label_M)))
    out_M = torch.zeros(len(label_M), dtype=torch.bool)
    labels = label_M.cpu().numpy()
    for label in np.unique(labels):
        of_class = order[labels[order.numpy()] == label]
        if len(of_class) > 1:
            out_M[of_class[: max(1, int(share * len(of_class)))]] = True
    return out_M


def require_two_images(label_M: torch.Tensor) -> None:
    """Raise DataError when no class (label >= 0) has two images: then nothing can be held out."""
    counts = label_M[label_M >= 0].bincount()
    if not bool((counts > 1).any()):
        raise DataError(
            "linear_probe: no class has two training images, so the penalty cannot be chosen; give more of "
            "train or leave linear_probe out of tasks"
        )


def evaluate_linear_probe(
    test_ND: torch.Tensor,
    label_N: torch.Tensor,
    train_MD: torch.Tensor,
    train_label_M: torch.Tensor,
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    share: float = 0.2,
    seed: int = 0,
) -> dict:
    """Top-1, top-5 and mean per class of the probe, and the penalty that the held-out part chose.

    Args:
        penalties: strengths to try.
        share: part of the training split that is held out for the choice.

    Raises:
        NonFinite: a feature is not finite.
        DataError: no class has two training images, so nothing can be held out.
    """
    require_finite("test", test_ND)
    require_finite("training", train_MD)
    require_two_images(train_label_M)
    out_M = held_out(train_label_M, share, f"linear_probe/{seed}").to(train_MD.device)
    train_label_M, label_N = train_label_M.to(train_MD.device), label_N.to(train_MD.device)
    mean_D, std_D = train_MD.mean(dim=0), train_MD.std(dim=0).clamp(min=1e-6)
    train_MD, test_ND = (train_MD - mean_D) / std_D, (test_ND - mean_D) / std_D

    tried: dict[float, float] = {}
    weight = None
    # From the strongest on: each is a good start for the next, and of equally good ones the strongest stays.
    for penalty in sorted(penalties, reverse=True):
        weight = fit_logistic(train_MD[~out_M], train_label_M[~out_M], classes, penalty, weight)
        guess = logits(train_MD[out_M], weight).argmax(dim=1)
        tried[penalty] = float((guess == train_label_M[out_M]).double().mean())
    best = max(tried, key=lambda penalty: tried[penalty])
    weight = fit_logistic(train_MD, train_label_M, classes, best)
    ranks_N = label_ranks(logits(test_ND, weight), label_N)
    return {
        "classes": classes,
        "train_images": len(train_MD),
        "penalty": best,
        "held_out": int(out_M.sum()),
        "held_out_top1": {f"{penalty:g}": value for penalty, value in tried.items()},
        **classification_scores(ranks_N, label_N, classes, f"linear_probe/{seed}"),
    }
