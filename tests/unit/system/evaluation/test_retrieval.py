"""Caption-aware recall against a slow and plain ranking."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import NonFinite
from system.evaluation import retrieval
from system.evaluation.retrieval import (
    CaptionGroups,
    best_matches,
    chance_recall,
    evaluate_retrieval,
    pair_ranks,
    right_ranks,
)

WORDS = ["A dog", "a  dog ", "a cat", "tree", "the sea", "A CAT", "house", "snow"]


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def plain_recall(query: torch.Tensor, gallery: torch.Tensor, right: list[set[int]], k: int) -> float:
    hits = 0
    for vector, answers in zip(query, right, strict=True):
        order = sorted(range(len(gallery)), key=lambda g, v=vector: -float(v @ gallery[g]))
        hits += bool(answers & set(order[:k]))
    return hits / len(query)


def test_captions_that_differ_in_case_and_white_space_are_one_text():
    groups = CaptionGroups.of(["A dog", "a  dog ", "a cat", "A DOG"])
    assert groups.texts == ("A dog", "a cat")
    assert groups.group_N.tolist() == [0, 0, 1, 0]


@given(captions=st.lists(st.sampled_from(WORDS), min_size=1, max_size=25), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_recall_is_that_of_a_plain_ranking(captions: list[str], seed: int):
    groups = CaptionGroups.of(captions)
    image, text = unit(len(captions), 8, seed), unit(len(groups.texts), 8, seed + 1)
    result = evaluate_retrieval(image, text, groups)
    group = groups.group_N.tolist()
    of_text = [{i for i, g in enumerate(group) if g == t} for t in range(len(groups.texts))]
    for k in (1, 5, 10):
        assert result["image_to_text"][f"r{k}"] == plain_recall(image, text, [{g} for g in group], k)
        assert result["text_to_image"][f"r{k}"] == plain_recall(text, image, of_text, k)


def test_chunks_do_not_change_ranks_or_matches(monkeypatch: pytest.MonkeyPatch):
    query, gallery = unit(23, 6, 0), unit(17, 6, 1)
    query_group, gallery_group = torch.arange(23) % 5, torch.arange(17) % 7
    whole = right_ranks(query, gallery, query_group, gallery_group)
    best = best_matches(query, gallery, 5)
    monkeypatch.setattr(retrieval, "CHUNK_SCORES", 40)
    assert torch.equal(right_ranks(query, gallery, query_group, gallery_group), whole)
    query_pair, gallery_pair = (query_group[:, None] == gallery_group[None, :]).nonzero().unbind(dim=1)
    mixed = torch.randperm(len(query_pair), generator=torch.Generator().manual_seed(2))
    assert torch.equal(pair_ranks(query, gallery, query_pair[mixed], gallery_pair[mixed]), whole)
    assert torch.equal(best_matches(query, gallery, 5)[1], best[1])


def test_a_collapsed_model_scores_zero():
    captions = [f"text {number}" for number in range(20)]
    same = torch.ones(20, 4) / 2
    result = evaluate_retrieval(same, same, CaptionGroups.of(captions))
    assert result["image_to_text"]["r10"] == 0
    assert result["text_to_image"]["median_rank"] == 20


def test_a_perfect_model_scores_one():
    captions = ["a", "b", "b", "c"]
    text = torch.eye(3)
    result = evaluate_retrieval(text[[0, 1, 1, 2]], text, CaptionGroups.of(captions))
    for direction in ("image_to_text", "text_to_image"):
        assert result[direction] == {"r1": 1.0, "r5": 1.0, "r10": 1.0, "median_rank": 1}


@given(data=st.data(), seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_an_image_with_several_captions_is_hit_by_any(data: st.DataObject, seed: int):
    images = data.draw(st.integers(1, 8))
    pairs = [
        (image, caption)
        for image in range(images)
        for caption in data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
    ]
    groups = CaptionGroups.of([caption for _, caption in pairs])
    image, text = unit(images, 8, seed), unit(len(groups.texts), 8, seed + 1)
    result = evaluate_retrieval(image, text, groups, torch.tensor([number for number, _ in pairs]))
    of_image: list[set[int]] = [set() for _ in range(images)]
    of_text: list[set[int]] = [set() for _ in groups.texts]
    for (number, _), group in zip(pairs, groups.group_N.tolist(), strict=True):
        of_image[number].add(group)
        of_text[group].add(number)
    for k in (1, 5, 10):
        assert result["image_to_text"][f"r{k}"] == plain_recall(image, text, of_image, k)
        assert result["text_to_image"][f"r{k}"] == plain_recall(text, image, of_text, k)


def test_images_without_a_caption_ask_for_nothing_and_stay_in_the_way():
    text = torch.eye(3)
    images = text[[0, 1, 1]]
    result = evaluate_retrieval(images, text[:2], CaptionGroups.of(["a", "b"]), torch.tensor([0, 1]))
    assert result["image_to_text"]["r1"] == 1.0
    assert result["text_to_image"]["r1"] == 0.5  # the third picture is as near to "b" as its own


def test_shuffled_captions_are_chance():
    images = unit(400, 16, 0)
    captions = [f"text {number}" for number in range(400)]
    shuffled = images[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    result = evaluate_retrieval(images, shuffled, CaptionGroups.of(captions))
    for direction in ("image_to_text", "text_to_image"):
        low, high = result["interval"][direction]["r10"]
        assert low <= result["chance"][direction]["r10"] <= high
        assert result["chance"][direction]["r10"] == pytest.approx(10 / 400)


@pytest.mark.parametrize(("right", "gallery"), [(1, 7), (3, 7), (7, 7), (2, 4)])
def test_chance_is_the_share_of_all_orders_that_hit(right: int, gallery: int):
    for k in (1, 5):
        draws = list(itertools.combinations(range(gallery), min(k, gallery)))
        hits = sum(any(item < right for item in draw) for draw in draws)
        assert chance_recall([right], gallery)[f"r{k}"] == pytest.approx(hits / len(draws))


def test_chance_is_the_mean_over_queries_of_different_luck():
    assert chance_recall([1, 1, 2], 10)["r1"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_no_score(value: float):
    image = unit(3, 4, 0)
    image[1, 2] = value
    with pytest.raises(NonFinite, match="1 of 3 image embeddings"):
        evaluate_retrieval(image, unit(3, 4, 1), CaptionGroups.of(["a", "b", "c"]))
