"""The loss of a batch does not depend on how many ranks share it, and neither does its gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import contrastive, losses
from model.losses import Collectives, SingleProcess
from model.objective import Output
from tests.unit.model.samples import (
    ThreadRank,
    gradients,
    make_batch,
    make_config,
    make_pair,
    on_ranks,
    relative_error,
)


def padded_slice(batch: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """The rows of one rank; a short rank repeats its first sample (or sample 0) with weight 0."""
    total = len(batch["weight"])
    rows_per_rank = -(-total // size)
    rows = list(range(rank * rows_per_rank, min((rank + 1) * rows_per_rank, total)))
    fillers = rows_per_rank - len(rows)
    index = torch.tensor(rows + [rows[0] if rows else 0] * fillers)
    part = {name: value[index] for name, value in batch.items()}
    part["weight"][len(rows) :] = 0
    return part


def contrast(features: Tensor, scale: Tensor, weight: Tensor, comm: Collectives) -> Tensor:
    shares = losses.mean_shares(weight, comm)
    image_text, text_image = contrastive.info_nce(features[0], features[1], scale, shares, comm)
    return image_text + text_image


@pytest.mark.parametrize("size", [1, 2, 4])
def test_contrastive_over_ranks(size: int):
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(2, 3 * size, 16, generator=generator), dim=-1)
    weight = torch.ones(3 * size)
    weight[-2:] = 0
    scale = torch.tensor([14.0])

    whole = features.clone().requires_grad_()
    expected = contrast(whole, scale, weight, SingleProcess())
    expected.backward()

    def work(comm: ThreadRank) -> tuple[Tensor, Tensor]:
        rows = slice(3 * comm.rank, 3 * comm.rank + 3)
        own = features[:, rows].clone().requires_grad_()
        loss = contrast(own, scale, weight[rows], comm)
        loss.backward()
        assert own.grad is not None
        return loss.detach(), own.grad

    results = on_ranks(size, work)
    assert whole.grad is not None
    # A rank's features get size times the gradient: averaging parameters' gradients over ranks divides by it.
    gathered = torch.cat([grad for _, grad in results], dim=1) / size
    assert relative_error(torch.stack([loss for loss, _ in results]).mean(), expected) <= 1e-6
    assert relative_error(gathered, whole.grad) <= 1e-6


@pytest.mark.parametrize("size", [2, 3])
def test_objective_over_ranks(size: int):
    config = make_config()
    objective, teacher = make_pair(config)
    batch = make_batch(config, 5)
    expected = objective(batch, teacher, 0.05, SingleProcess())
    expected.loss.backward()
    expected_gradients = gradients(objective)
    objective.zero_grad(set_to_none=True)
    replicas = [copy.deepcopy(objective) for _ in range(size)]

    def work(comm: ThreadRank) -> Output:
        output = replicas[comm.rank](padded_slice(batch, comm.rank, size), teacher, 0.05, comm)
        output.loss.backward()
        return output

    outputs = on_ranks(size, work)
    per_rank = [gradients(replica) for replica in replicas]
    for name, gradient in expected_gradients.items():
        average = torch.stack([grads[name] for grads in per_rank]).mean(dim=0)
        assert relative_error(average, gradient) <= 1e-5, name
    average_loss = torch.stack([output.loss.detach() for output in outputs]).mean()
    assert relative_error(average_loss, expected.total) <= 1e-6
    for output in outputs:
        assert relative_error(output.total, expected.total) <= 1e-6
        assert relative_error(output.centre_K, expected.centre_K) <= 1e-5
        for own, whole in ((output.terms, expected.terms), (output.metrics, expected.metrics)):
            assert own.keys() == whole.keys()
            assert all(relative_error(own[name], whole[name]) <= 1e-6 for name in whole)
