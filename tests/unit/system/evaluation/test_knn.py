"""The weighted vote against a loop."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import NonFinite
from system.evaluation.knn import evaluate_knn, knn_votes


def features(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_votes(test: torch.Tensor, train: torch.Tensor, labels: list[int], k: int, temperature: float):
    for vector in test:
        cosines = [float(vector @ other / vector.norm() / other.norm()) for other in train]
        nearest = sorted(range(len(train)), key=lambda place: -cosines[place])[:k]
        votes: dict[int, float] = defaultdict(float)
        for place in nearest:
            votes[labels[place]] += math.exp(cosines[place] / temperature)
        yield votes


@given(
    train=st.integers(1, 40),
    k=st.integers(1, 25),
    temperature=st.sampled_from([0.05, 0.07, 1.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_votes_are_those_of_a_loop_up_to_a_factor(train: int, k: int, temperature: float, seed: int):
    test_ND, train_MD = features(5, seed), features(train, seed + 1)
    labels = [(7 * number + seed) % 4 for number in range(train)]
    votes_NC = knn_votes(test_ND, train_MD, torch.tensor(labels), 4, k=k, temperature=temperature)
    for row, expected in zip(votes_NC, loop_votes(test_ND, train_MD, labels, k, temperature), strict=True):
        total = sum(expected.values())
        shares = torch.tensor([expected[label] / total for label in range(4)], dtype=torch.float64)
        torch.testing.assert_close(row / row.sum(), shares)


def test_one_hot_classes_are_all_right():
    labels = torch.arange(60) % 6
    train_labels = torch.arange(30) % 6
    result = evaluate_knn(torch.eye(6)[labels], labels, 3 * torch.eye(6)[train_labels], train_labels, 6, k=5)
    assert (result["top1"], result["mean_per_class"], result["k"]) == (1.0, 1.0, 5)


def test_a_class_without_votes_is_not_among_the_first_five():
    labels = torch.full((4,), 3)
    result = evaluate_knn(torch.ones(4, 2), labels, torch.ones(9, 2), torch.zeros(9, dtype=torch.int64), 4)
    assert (result["top1"], result["k"]) == (0.0, 9)
    assert result["top5"] == 1.0  # there are only four classes
    many = evaluate_knn(torch.ones(4, 2), labels, torch.ones(9, 2), torch.zeros(9, dtype=torch.int64), 9)
    assert many["top5"] == 0.0


def test_features_that_are_not_finite_are_no_score():
    broken = torch.full((2, 2), math.nan)
    with pytest.raises(NonFinite, match="2 of 2 training"):
        evaluate_knn(torch.ones(2, 2), torch.zeros(2).long(), broken, torch.zeros(2).long(), 1)
