"""Scores over queries and how sure they are: shares of hits, means, bootstrap intervals.

The bootstrap draws as many queries as there are, with replacement, RESAMPLES times, and gives the 2.5 % and
97.5 % quantiles of the score. It speaks of the queries only: neither the weights' seed nor the choice of the
gallery or of the classes is in it. What it draws is keyed by a word, so the same scores have the same
interval. Not from the paper.

Shapes: Q queries, C classes, R resamples.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

RESAMPLES = 2000
LEVEL = 0.95
_QUANTILES = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_DRAWN_CELLS = 1 << 22
TOPS = {"top1": 1, "top5": 5}


def generator(key: str) -> np.random.Generator:
    """A generator that is a function of `key` alone."""
    return np.random.Generator(np.random.Philox(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])))


def share_interval(hits: int, total: int, key: str) -> list[float]:
    """Interval of the share hits / total: resampled hits are binomial, so nothing needs to be drawn one by
    one."""
    shares_R = generator(key).binomial(total, hits / total, RESAMPLES) / total
    return [float(value) for value in np.quantile(shares_R, _QUANTILES)]


def class_mean_interval(hits_C: np.ndarray, total_C: np.ndarray, key: str) -> list[float]:
    """Interval of the mean over classes of hits / total; a class that a resample leaves out is not in its
    mean."""
    cells_2C = np.stack([hits_C, total_C - hits_C])
    draw, means = generator(key), []
    queries, shares = int(total_C.sum()), cells_2C.ravel() / total_C.sum()
    at_once = max(1, _DRAWN_CELLS // len(shares))
    for start in range(0, RESAMPLES, at_once):
        drawn = draw.multinomial(queries, shares, size=min(at_once, RESAMPLES - start))
        hits_rC, misses_rC = drawn.reshape(len(drawn), 2, -1).swapaxes(0, 1)
        seen_rC = hits_rC + misses_rC
        means.append((hits_rC / np.maximum(seen_rC, 1)).sum(axis=1) / (seen_rC > 0).sum(axis=1))
    return [float(value) for value in np.quantile(np.concatenate(means), _QUANTILES)]


def mean_interval(values_Q: Sequence[float] | np.ndarray, key: str) -> list[float]:
    """Interval of the mean of any values."""
    values, draw = np.asarray(values_Q, np.float64), generator(key)
    means_R = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    return [float(value) for value in np.quantile(means_R, _QUANTILES)]


def classification_scores(ranks_Q: torch.Tensor, label_Q: torch.Tensor, classes: int, key: str) -> dict:
    """Scores of a classification, from the rank (0 = first) of the right class of each image.

    Returns:
        images, top1, top5, mean_per_class (of top1, over the classes that have images, as for Caltech or
        Pets in CLIP), interval and chance of each.
    """
    ranks, labels = ranks_Q.cpu(), label_Q.cpu()
    result: dict = {"images": len(ranks)}
    intervals = {}
    for name, k in TOPS.items():
        hits = int((ranks < k).sum())
        result[name] = hits / len(ranks)
        intervals[name] = share_interval(hits, len(ranks), f"{key}/{name}")
    total_C = torch.bincount(labels, minlength=classes).numpy()
    hits_C = torch.bincount(labels[ranks < 1], minlength=classes).numpy()
    hits_C, total_C = hits_C[total_C > 0], total_C[total_C > 0]
    result["mean_per_class"] = float((hits_C / total_C).mean())
    intervals["mean_per_class"] = class_mean_interval(hits_C, total_C, f"{key}/mean_per_class")
    chance = {"top1": 1 / classes, "top5": min(1.0, 5 / classes), "mean_per_class": 1 / classes}
    return {**result, "interval": intervals, "chance": chance}


def label_ranks(scores_QC: torch.Tensor, label_Q: torch.Tensor) -> torch.Tensor:
    """Rank (0 = first) of the right class: int64 [Q]. Classes with the same score are placed before it."""
    right_Q1 = scores_QC.gather(1, label_Q[:, None])
    return (scores_QC >= right_Q1).sum(dim=1) - 1
