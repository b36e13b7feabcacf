"""Intervals and class means against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from system.evaluation.scoring import (
    class_mean_interval,
    classification_scores,
    generator,
    label_ranks,
    mean_interval,
    share_interval,
)


@pytest.mark.parametrize(("hits", "total"), [(30, 100), (1, 50), (480, 500)])
def test_a_share_has_the_interval_of_its_resampled_hits(hits: int, total: int):
    values = np.repeat([1.0, 0.0], [hits, total - hits])
    for end, other in zip(share_interval(hits, total, "a"), mean_interval(values, "b"), strict=True):
        assert end == pytest.approx(other, abs=1.5 / total + 0.005)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    truth, total, draws = 0.3, 200, generator("truth").binomial(200, 0.3, size=300)
    intervals = [share_interval(int(hits), total, f"{number}") for number, hits in enumerate(draws)]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.985


def test_intervals_are_functions_of_their_key():
    assert share_interval(3, 10, "x") == share_interval(3, 10, "x")
    assert mean_interval(np.arange(50.0), "x") != mean_interval(np.arange(50.0), "y")


def test_sure_scores_have_no_width():
    assert share_interval(0, 20, "x") == [0.0, 0.0]
    assert class_mean_interval(np.array([4, 2]), np.array([4, 2]), "x") == [1.0, 1.0]


def test_the_interval_of_a_class_mean_is_that_of_resampled_images():
    hits, total = np.array([2, 5, 0]), np.array([3, 20, 4])
    right = np.concatenate([np.arange(n) < h for h, n in zip(hits, total, strict=True)])
    label, draw = np.repeat([0, 1, 2], total), generator("loop")
    means = []
    for _ in range(3000):
        some = draw.integers(len(label), size=len(label))
        seen = [right[some][label[some] == k].mean() for k in range(3) if (label[some] == k).any()]
        means.append(np.mean(seen))
    assert class_mean_interval(hits, total, "x") == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.03
    )


def test_one_image_per_class_does_not_make_a_class_mean_sure():
    low, high = class_mean_interval(np.arange(100) % 2, np.ones(100, np.int64), "x")
    assert low < 0.45 < 0.55 < high


@given(data=st.data(), classes=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_scores_are_those_of_a_loop(data: st.DataObject, classes: int):
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=30))
    ranks = data.draw(st.lists(st.integers(0, classes), min_size=len(labels), max_size=len(labels)))
    result = classification_scores(torch.tensor(ranks), torch.tensor(labels), classes, "loop")
    per_class = [
        np.mean([rank == 0 for rank, label in zip(ranks, labels, strict=True) if label == some])
        for some in sorted(set(labels))
    ]
    assert result["top1"] == pytest.approx(np.mean([rank == 0 for rank in ranks]))
    assert result["top5"] == pytest.approx(np.mean([rank < 5 for rank in ranks]))
    assert result["mean_per_class"] == pytest.approx(np.mean(per_class))
    for name, (low, high) in result["interval"].items():
        assert low <= result[name] + 1e-9
        assert high >= result[name] - 1e-9


def test_equal_scores_count_against_the_right_class():
    scores = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert label_ranks(scores, torch.tensor([0, 0, 2])).tolist() == [1, 0, 2]
