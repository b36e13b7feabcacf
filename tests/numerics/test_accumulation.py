"""Law: micro-batches have the loss and the gradient of one pass, in every variant of the objective."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.losses import Collectives, SingleProcess
from model.objective import Objective, Output
from model.teacher import Teacher
from system.engine.accumulate import Accumulator
from tests.numerics.test_model_ranks import padded_slice
from tests.unit.model.samples import (
    ThreadRank,
    gradients,
    make_batch,
    make_config,
    make_pair,
    on_ranks,
    relative_error,
)


class PlainEngine:
    """What an `Accumulator` asks of `system.engine.engine.Engine`, by PyTorch alone."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Any:
        return self.objective.features(batch)

    def shares(self, *arguments: Any) -> Any:
        return self.objective.shares(*arguments)

    def add_gradient(self, loss: Tensor) -> None:
        loss.backward()


def accumulated(
    objective: Objective, teacher: Teacher | None, batch: dict[str, Tensor], count: int, comm: Collectives
) -> Output:
    accumulator = Accumulator(PlainEngine(objective), count)  # type: ignore[arg-type]
    output = accumulator.forward(batch, teacher, 0.05, comm)
    output.loss.backward()
    return output


def assert_same(output: Output, expected: Output) -> None:
    assert relative_error(output.total, expected.total) <= 1e-6
    for own, whole in ((output.terms, expected.terms), (output.metrics, expected.metrics)):
        assert own.keys() == whole.keys()
        assert all(relative_error(own[name], whole[name]) <= 2e-6 for name in whole)
    if expected.centre_K is not None:
        assert output.centre_K is not None
        assert relative_error(output.centre_K, expected.centre_K) <= 1e-5


def variants() -> dict[str, ModelConfig]:
    base = make_config()
    vision = replace(base.vision, stochastic_depth=0.5, patch_dropout=0.5)
    return {
        "paper": base,
        "sigmoid": replace(base, contrastive="sigmoid"),
        "shared text pass": replace(base, mlm=replace(base.mlm, text_pass="shared")),
        "pixels": replace(base, distill=replace(base.distill, target="pixels")),
        "contrast only": make_config(distill_weight=0, mlm_weight=0),
        "keyed chance": replace(base, vision=vision),
    }


@pytest.mark.parametrize(("name", "count"), [("paper", 7), *((name, 2) for name in variants())])
def test_micro_batches_equal_one_pass(name: str, count: int):
    """7 rows in parts of 4 and 3, and one by one; one row has no weight."""
    config = variants()[name]
    objective, known = make_pair(config) if config.distill.needs_teacher else (Objective(config, 1), None)
    batch = make_batch(config, 7)
    batch["weight"][2] = 0
    expected = objective(batch, known, 0.05, SingleProcess())
    expected.loss.backward()
    wanted = gradients(objective)
    objective.zero_grad(set_to_none=True)
    assert_same(accumulated(objective, known, batch, count, SingleProcess()), expected)
    for parameter, gradient in gradients(objective).items():
        assert relative_error(gradient, wanted[parameter]) <= 2e-5, parameter


def test_negatives_come_from_all_micro_batches_of_all_ranks():
    config = make_config()
    objective, teacher = make_pair(config)
    batch = make_batch(config, 7)
    expected = objective(batch, teacher, 0.05, SingleProcess())
    expected.loss.backward()
    wanted = gradients(objective)
    objective.zero_grad(set_to_none=True)
    replicas = [copy.deepcopy(objective) for _ in range(2)]

    def work(comm: ThreadRank) -> Output:
        return accumulated(replicas[comm.rank], teacher, padded_slice(batch, comm.rank, 2), 3, comm)

    for output in on_ranks(2, work):
        assert_same(output, expected)
    found = [gradients(replica) for replica in replicas]
    for parameter, gradient in wanted.items():
        average = torch.stack([own[parameter] for own in found]).mean(dim=0)
        assert relative_error(average, gradient) <= 2e-5, parameter
