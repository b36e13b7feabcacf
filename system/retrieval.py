"""Caption-aware image-text retrieval: recall at k, its chance level and the best matches of a few queries.

Shapes: N images, U distinct texts, Q queries, G gallery entries, E embedding width, K matches kept.

Many images share one caption ("A flower." six times in a small set, "image" thousands of times on the web).
Counting only the pair's own partner as a hit would call a right answer wrong, so identical captions are one
text here: an image has one right text, a text has all images that carry it. The protocol is not from the
paper, which reports Flickr30k and COCO.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import NonFinite

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


def evaluate_retrieval(image_NE: torch.Tensor, text_UE: torch.Tensor, groups: CaptionGroups) -> dict:
    """Recall in both directions with its chance level.

    `image_NE` and `text_UE` are unit vectors: one per image, one per distinct text. Raises NonFinite.
    """
    require_finite("image", image_NE)
    require_finite("text", text_UE)
    num_images, num_texts = len(image_NE), len(text_UE)
    text_group_U = torch.arange(num_texts, device=image_NE.device)
    group_N = groups.group_N.to(image_NE.device)
    image_ranks_N = right_ranks(image_NE, text_UE, group_N, text_group_U)
    text_ranks_U = right_ranks(text_UE, image_NE, text_group_U, group_N)
    images_per_text = torch.bincount(groups.group_N, minlength=num_texts).tolist()
    return {
        "images": num_images,
        "texts": num_texts,
        "image_to_text": {**recall(image_ranks_N), "median_rank": _median_rank(image_ranks_N)},
        "text_to_image": {**recall(text_ranks_U), "median_rank": _median_rank(text_ranks_U)},
        "chance": {
            "image_to_text": chance_recall([1], num_texts),
            "text_to_image": chance_recall(images_per_text, num_images),
        },
    }


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
