"""Logistic regression: its optimum, its choice of penalty, and data that a line separates."""

import pytest
import torch
import torch.nn.functional as F

from cluster.errors import DataError
from system.evaluation.linear_probe import evaluate_linear_probe, fit_logistic, held_out


def clusters(rows: int, seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 4
    centres = 4 * torch.eye(4, 10)
    return centres[labels] + spread * torch.randn(rows, 10, generator=draw), labels


def test_separable_data_are_separated():
    train, train_labels = clusters(80, 0, 0.3)
    test, labels = clusters(60, 1, 0.3)
    result = evaluate_linear_probe(1000 * test + 5, labels, 1000 * train + 5, train_labels, 4)
    assert (result["top1"], result["mean_per_class"]) == (1.0, 1.0)
    assert result["held_out"] == 16


def test_labels_without_a_cause_are_chance():
    draw = torch.Generator().manual_seed(3)
    train, test = torch.randn(2, 400, 10, generator=draw)
    labels = torch.randint(0, 4, (400,), generator=draw)
    result = evaluate_linear_probe(test, labels.roll(7), train, labels, 4)
    assert abs(result["top1"] - 0.25) < 0.1


@pytest.mark.parametrize("penalty", [1e-2, 1.0])
def test_the_fit_is_a_minimum_wherever_it_begins(penalty: float):
    feature, labels = clusters(60, 2, 2.0)
    feature = feature.double()

    def gradient(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.clone().requires_grad_(True)
        loss = F.cross_entropy(feature @ weight[:-1] + weight[-1], labels)
        (loss + penalty / 2 * weight[:-1].square().sum()).backward()
        assert weight.grad is not None
        return weight.grad

    start = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    plain, other = (fit_logistic(feature, labels, 4, penalty, begin) for begin in (None, start))
    for weight in (plain, other):
        assert gradient(weight).abs().max() < 1e-4
    # The bias is free up to a constant.
    torch.testing.assert_close(plain[:-1], other[:-1], atol=1e-3, rtol=1e-2)


def test_a_part_of_every_class_is_held_out_and_never_all_of_it():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2])
    out = held_out(labels, 0.2, "key")
    assert [int(out[labels == label].sum()) for label in range(3)] == [2, 1, 0]
    assert torch.equal(out, held_out(labels, 0.2, "key"))
    assert any(not torch.equal(out, held_out(labels, 0.2, f"{other}")) for other in range(5))


def test_the_best_penalty_on_the_held_out_part_is_taken_and_of_equal_ones_the_strongest():
    feature, labels = clusters(60, 4, 3.0)
    result = evaluate_linear_probe(feature, labels, feature, labels, 4, penalties=(1e-4, 1e-2, 1.0, 1e3))
    tried = {float(penalty): value for penalty, value in result["held_out_top1"].items()}
    assert set(tried) == {1e-4, 1e-2, 1.0, 1e3}
    best = max(tried.values())
    assert result["penalty"] == max(penalty for penalty, value in tried.items() if value == best)
    assert len(set(tried.values())) > 1


def test_one_image_per_class_cannot_choose_a_penalty():
    with pytest.raises(DataError, match="no class has two training images"):
        evaluate_linear_probe(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), 3)
