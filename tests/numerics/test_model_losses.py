"""The losses and their gradients against loops in float64."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model import contrastive, losses
from model.losses import SingleProcess
from tests.unit.model.samples import relative_error

COMM = SingleProcess()


def unit(rows: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def leaves(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]


def slopes(tensors: list[Tensor]) -> list[Tensor]:
    found = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert len(found) == len(tensors)
    return found


def shares(weights: Tensor) -> Tensor:
    return losses.mean_shares(weights, COMM)


def close(values: list[Tensor], expected: list[Tensor]) -> bool:
    return all(relative_error(*pair) <= 1e-6 for pair in zip(values, expected, strict=True))


def contrastive_loop(queries: Tensor, keys: Tensor, scale: Tensor, weights: list[float]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    present = [index for index, weight in enumerate(weights) if weight > 0]
    for i in present:
        below = sum(torch.exp(scale[0] * queries[i] @ keys[j]) for j in present)
        total = total - weights[i] * torch.log(torch.exp(scale[0] * queries[i] @ keys[i]) / below)
    return total / sum(weights)


def test_contrastive_and_its_gradient():
    weights = [1.0, 1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 3.0]
    image, text = unit(len(weights), 24, 0), unit(len(weights), 24, 1)
    scale = torch.tensor([1 / 0.07])
    own = leaves(torch.float32, image, text, scale)
    image_text, text_image = contrastive.info_nce(own[0], own[1], own[2], shares(torch.tensor(weights)), COMM)
    (image_text + text_image).backward()

    reference = leaves(torch.float64, image, text, scale)
    first = contrastive_loop(reference[0], reference[1], reference[2], weights)
    second = contrastive_loop(reference[1], reference[0], reference[2], weights)
    (first + second).backward()
    assert close([image_text, text_image], [first, second])
    assert close(slopes(own), slopes(reference))


def test_absent_samples_have_no_influence():
    image, text, scale = unit(5, 16, 2), unit(5, 16, 3), torch.tensor([10.0])
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    some = contrastive.info_nce(image, text, scale, shares(weight), COMM)
    alone = contrastive.info_nce(image[:3], text[:3], scale, shares(weight[:3]), COMM)
    assert close(list(some), list(alone))


def test_distillation_and_its_gradient():
    samples, masked, codewords = 5, 7, 12
    generator = torch.Generator().manual_seed(4)
    student = torch.rand(samples, masked, codewords, generator=generator) * 2 - 1
    teacher = torch.rand(samples, masked, codewords, generator=generator) * 2 - 1
    centre = torch.rand(codewords, generator=generator) * 0.2
    weights = [1.0, 0.0, 2.0, 1.0, 1.0]
    (own,) = leaves(torch.float32, student)
    loss = losses.distill(
        own, losses.teacher_targets(teacher, centre, 0.05), 0.1, shares(torch.tensor(weights))
    )
    loss.backward()

    (reference,) = leaves(torch.float64, student)
    expected = torch.zeros((), dtype=torch.float64)
    for sample in range(samples):
        for patch in range(masked):
            target = torch.exp((teacher[sample, patch].double() - centre.double()) / 0.05)
            guess = torch.exp(reference[sample, patch] / 0.1)
            for k in range(codewords):
                term = target[k] / target.sum() * torch.log(guess[k] / guess.sum())
                expected = expected - weights[sample] / (sum(weights) * masked) * term
    expected.backward()
    assert close([loss, *slopes([own])], [expected, *slopes([reference])])


def test_masked_language_modelling_and_its_gradient():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(9, 50, generator=generator) * 3
    words = torch.randint(0, 50, (9,), generator=generator)
    weights = [1.0, 1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 0.0, 1.0]
    (own,) = leaves(torch.float32, logits)
    loss = losses.mlm(own, words, shares(torch.tensor(weights)))
    loss.backward()

    (reference,) = leaves(torch.float64, logits)
    expected = torch.zeros((), dtype=torch.float64)
    for row, word, weight in zip(reference, words.tolist(), weights, strict=True):
        expected = expected - weight * torch.log(torch.exp(row[word]) / torch.exp(row).sum()) / sum(weights)
    expected.backward()
    assert close([loss, *slopes([own])], [expected, *slopes([reference])])


def test_a_mean_over_nothing_is_zero():
    nothing = losses.mlm(torch.zeros(0, 50), torch.zeros(0, dtype=torch.int64), shares(torch.zeros(0)))
    assert float(nothing) == 0.0
    assert shares(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_untrained_features_cost_the_logarithm_of_the_batch():
    same = unit(1, 8, 6).expand(16, 8)
    terms = contrastive.info_nce(same, same, torch.tensor([5.0]), shares(torch.ones(16)), COMM)
    assert all(math.isclose(float(term), math.log(16), rel_tol=1e-6) for term in terms)
