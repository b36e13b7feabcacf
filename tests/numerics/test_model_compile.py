"""Compiled blocks are the blocks."""

import torch

from model.blocks import compile_blocks
from model.losses import SingleProcess
from tests.unit.model.samples import gradients, make_batch, make_config, make_pair, relative_error


def test_compiled_blocks_give_the_same_loss_and_gradient():
    config = make_config()
    batch = make_batch(config, 6)
    results = []
    for compiled in (False, True):
        objective, teacher = make_pair(config)
        names = [name for name, _ in objective.named_parameters()]
        if compiled:
            compile_blocks(objective)
            compile_blocks(teacher)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
        loss = objective(batch, teacher, 0.05, SingleProcess()).loss
        loss.backward()
        assert [name for name, _ in objective.named_parameters()] == names
        results.append((loss, gradients(objective)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
    assert relative_error(results[1][0], results[0][0]) <= 1e-6
    for name, gradient in results[0][1].items():
        assert relative_error(results[1][1][name], gradient) <= 1e-5, name
