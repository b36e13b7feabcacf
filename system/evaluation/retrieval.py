"""Caption-aware image-text retrieval: recall at k, its chance level and the best matches of a few queries.

Shapes: N images, U distinct texts, Q queries, G gallery entries, E embedding width, K matches kept.

Many images share one caption ("A flower." six times in a small set, "image" thousands of times on the web).
Counting only the pair's own partner as a hit would call a right answer wrong, so identical captions are one
text here, and a text has all images that carry it. An image has all its captions (five in Flickr30k and
COCO, which the paper reports): it is a hit when any of them is found. With distinct captions this is their
protocol.

Besides the legend: P pairs of an image and one of its captions.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import NonFinite
from system.evaluation.scoring import share_interval

CUTOFFS = (1, 5, 10)
# Similarities held at once: 2**24 float32 are 64 MiB, so N x U is never built for a large set.
CHUNK_SCORES = 1 << 24


def normalise_caption(caption: str) -> str:
    """The form under which two captions count as the same text: NFC, case folded, whitespace collapsed."""
    return " ".join(unicodedata.normalize("NFC", caption).casefold().split())


@dataclass(frozen=True)
class CaptionGroups:
    """The distinct texts of a set of captions, in order of first appearance."""

    texts: tuple[str, ...]
    """U captions as they were first written."""
    group_N: torch.Tensor
    """int64 [N]: which text every caption is."""

    @classmethod
    def of(cls, captions: Sequence[str]) -> "CaptionGroups":
        index: dict[str, int] = {}
        texts: list[str] = []
        group = np.empty(len(captions), dtype=np.int64)
        for position, caption in enumerate(captions):
            key = normalise_caption(caption)
            if key not in index:
                index[key] = len(texts)
                texts.append(caption)
            group[position] = index[key]
        return cls(tuple(texts), torch.from_numpy(group))


def require_finite(name: str, embeddings_NE: torch.Tensor) -> None:
    """Raise NonFinite for nan or inf: every comparison with nan is false and would score as a hit."""
    broken = int((~torch.isfinite(embeddings_NE)).any(dim=1).sum())
    if broken:
        raise NonFinite(
            f"{broken} of {len(embeddings_NE)} {name} embeddings are not finite; take an earlier checkpoint"
        )


def right_ranks(
    query_QE: torch.Tensor,
    gallery_GE: torch.Tensor,
    query_group_Q: torch.Tensor,
    gallery_group_G: torch.Tensor,
) -> torch.Tensor:
    """Rank (0 = first) of the best right gallery entry of every query: int64 [Q].

    An entry is right if its group equals the query's. Wrong entries that tie with it are placed before it, so
    a collapsed model scores zero and not one hundred percent. A query without a right entry gets the rank G.
    """
    ranks = []
    for rows in _chunks(len(query_QE), len(gallery_GE)):
        scores_QG = query_QE[rows] @ gallery_GE.T
        right_QG = query_group_Q[rows, None] == gallery_group_G[None, :]
        best_Q1 = scores_QG.masked_fill(~right_QG, -math.inf).amax(dim=1, keepdim=True)
        ranks.append(((scores_QG >= best_Q1) & ~right_QG).sum(dim=1))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def pair_ranks(
    query_QE: torch.Tensor, gallery_GE: torch.Tensor, query_P: torch.Tensor, gallery_P: torch.Tensor
) -> torch.Tensor:
    """As `right_ranks`, where any number of gallery entries is right: query_P[p] and gallery_P[p] belong
    together."""
    order_P = query_P.argsort(stable=True)
    query_P, gallery_P = query_P[order_P], gallery_P[order_P]
    ranks = []
    for rows in _chunks(len(query_QE), len(gallery_GE)):
        ends = torch.tensor([rows.start, rows.stop], device=query_P.device)
        first, last = torch.searchsorted(query_P, ends).tolist()
        scores_QG = query_QE[rows] @ gallery_GE.T
        right_QG = torch.zeros_like(scores_QG, dtype=torch.bool)
        right_QG[query_P[first:last] - rows.start, gallery_P[first:last]] = True
        best_Q1 = scores_QG.masked_fill(~right_QG, -math.inf).amax(dim=1, keepdim=True)
        ranks.append(((scores_QG >= best_Q1) & ~right_QG).sum(dim=1))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def best_matches(
    query_QE: torch.Tensor, gallery_GE: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [Q, K] and gallery positions [Q, K] of the K = min(keep, G) best entries, best first."""
    keep = min(keep, len(gallery_GE))
    parts = [
        torch.topk(query_QE[rows] @ gallery_GE.T, keep, dim=1)
        for rows in _chunks(len(query_QE), len(gallery_GE))
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def recall(ranks_Q: torch.Tensor) -> dict[str, float]:
    """Share of the queries whose right answer is among the first 1, 5, 10."""
    return {f"r{k}": float((ranks_Q < k).double().mean()) for k in CUTOFFS}


def chance_recall(right_Q: Sequence[int], gallery: int) -> dict[str, float]:
    """Expected recall of a random order: query q has right_Q[q] right answers among `gallery` entries."""
    sizes, counts = np.unique(np.asarray(right_Q, dtype=np.int64), return_counts=True)
    chance = {}
    for k in CUTOFFS:
        hit = [1.0 - _all_wrong(int(size), gallery, k) for size in sizes]
        chance[f"r{k}"] = float(np.average(hit, weights=counts))
    return chance


def evaluate_retrieval(
    image_NE: torch.Tensor,
    text_UE: torch.Tensor,
    groups: CaptionGroups,
    image_P: torch.Tensor | None = None,
    seed: int = 0,
) -> dict:
    """Recall in both directions with bootstrap intervals (over the queries) and its chance level.

    Args:
        image_NE: unit vectors, one per image.
        text_UE: unit vectors, one per distinct text.
        groups: the captions of the set.
        image_P: int64, the image of each of these captions; none: caption n is that of image n.
        seed: keys the bootstrap.

    Raises:
        NonFinite: an embedding is not finite.
    """
    require_finite("image", image_NE)
    require_finite("text", text_UE)
    num_images, num_texts = len(image_NE), len(text_UE)
    carriers_P = torch.arange(num_images) if image_P is None else image_P.cpu()
    pairs_P2 = torch.stack([carriers_P, groups.group_N], dim=1).unique(dim=0).to(image_NE.device)
    shown_P, text_P = pairs_P2[:, 0], pairs_P2[:, 1]
    # An image without a caption asks for nothing; it still stands in the gallery.
    asking = shown_P.unique()
    ranks = {
        "image_to_text": pair_ranks(image_NE, text_UE, shown_P, text_P)[asking],
        "text_to_image": pair_ranks(text_UE, image_NE, text_P, shown_P),
    }
    texts_per_image = torch.bincount(shown_P, minlength=num_images)[asking].tolist()
    images_per_text = torch.bincount(text_P, minlength=num_texts).tolist()
    return {
        "images": num_images,
        "texts": num_texts,
        "pairs": len(pairs_P2),
        **{name: {**recall(found), "median_rank": _median_rank(found)} for name, found in ranks.items()},
        "interval": {name: _intervals(found, f"{name}/{seed}") for name, found in ranks.items()},
        "chance": {
            "image_to_text": chance_recall(texts_per_image, num_texts),
            "text_to_image": chance_recall(images_per_text, num_images),
        },
    }


def _intervals(ranks_Q: torch.Tensor, key: str) -> dict[str, list[float]]:
    return {f"r{k}": share_interval(int((ranks_Q < k).sum()), len(ranks_Q), f"{key}/r{k}") for k in CUTOFFS}


def _median_rank(ranks_Q: torch.Tensor) -> int:
    return int(ranks_Q.median()) + 1


def _all_wrong(right: int, gallery: int, k: int) -> float:
    """Probability that k draws without replacement hit none of the `right` entries."""
    probability = 1.0
    for drawn in range(min(k, gallery)):
        probability *= max(0, gallery - right - drawn) / (gallery - drawn)
    return probability


def _chunks(queries: int, gallery: int) -> Iterator[slice]:
    rows = max(1, CHUNK_SCORES // max(1, gallery))
    for start in range(0, queries, rows):
        yield slice(start, min(start + rows, queries))
