"""Which parameters decay, and how fast each layer learns."""

from dataclasses import replace

import pytest
import torch

from model.config import preset
from model.objective import Objective
from system.config import OptimizerConfig
from system.engine.optim import build_optimizer, set_learning_rate


def learning_rates(layer_decay: float) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) of every parameter."""
    objective = Objective(preset("test"), seed=0)
    optimizer = build_optimizer(objective, replace(OptimizerConfig(), layer_decay=layer_decay))
    set_learning_rate(optimizer, 0.1)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_norms_biases_and_the_logit_scale_do_not_decay():
    objective = Objective(preset("test"), seed=0)
    shapes = {name: parameter.ndim for name, parameter in objective.named_parameters()}
    found = learning_rates(1.0)
    assert found.keys() == shapes.keys()
    for name, (lr, decay) in found.items():
        assert lr == 0.1
        assert decay == (0.5 if shapes[name] > 1 else 0.0)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vision.patch_embedding.weight", 3),
        ("vision.positions", 3),
        ("vision.input_norm.bias", 3),
        ("text.token_embedding.weight", 3),
        ("vision.transformer.blocks.0.mlp_in.weight", 2),
        ("text.transformer.blocks.1.attention_qkv.bias", 1),
        ("vision.transformer.norm.weight", 0),
        ("image_projection.weight", 0),
        ("decoder.transformer.blocks.0.mlp_in.weight", 0),
        ("text_decoder.transformer.blocks.0.mlp_in.weight", 0),
        ("logit_scale", 0),
    ],
)
def test_the_rate_falls_towards_the_embeddings(name: str, layers: int):
    assert learning_rates(0.5)[name][0] == pytest.approx(0.1 * 0.5**layers)


def test_it_is_adamw():
    assert isinstance(build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig()), torch.optim.AdamW)
