"""The mapping of our settings to DeepSpeed's, whole: what is not said here is DeepSpeed's default."""

from itertools import product
from typing import Any

import pytest

from model.config import preset
from system.config import DataConfig, EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from system.engine.ds_config import deepspeed_config


def mapped(local_batch: int = 6, world_size: int = 2, clip: float = 0.0, **engine: Any) -> dict[str, Any]:
    config = TrainConfig(
        run=RunConfig(uri="none", steps=1),
        data=DataConfig(uri="none", global_batch=64),
        model=preset("test"),
        optimizer=OptimizerConfig(gradient_clip=clip),
        engine=EngineConfig(**engine),
    )
    return deepspeed_config(config, local_batch, world_size)


def expected(
    stage: int, precision: str, accumulation: int, optimizer: bool, parameters: bool
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if parameters:
        zero["offload_param"] = {"device": "cpu"}
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": {1: 6, 4: 2}[accumulation],
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": {1: 12, 4: 16}[accumulation],
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 1,
            "min_loss_scale": 1,
        },
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if accumulation > 1:
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    return values


def test_every_combination_is_mapped_or_refused():
    refused = 0
    for stage, precision, accumulation, optimizer, parameters in product(
        (0, 1, 2, 3), ("fp32", "bf16", "fp16"), (1, 4), (False, True), (False, True)
    ):
        settings = {
            "zero_stage": stage,
            "precision": precision,
            "accumulation": accumulation,
            "offload_optimizer": optimizer,
            "offload_parameters": parameters,
        }
        impossible = (
            (optimizer and stage == 0)
            or (parameters and not (stage == 3 and optimizer))
            or (precision == "fp16" and stage == 0)
            or (accumulation > 1 and precision != "fp32" and stage < 2)
        )
        if impossible:
            refused += 1
            with pytest.raises(ValueError, match="set engine"):
                EngineConfig(**settings)
        else:
            values = mapped(clip=0.5, **settings)
            assert values == expected(stage, precision, accumulation, optimizer, parameters), settings
    assert refused == 55  # 41 are possible


@pytest.mark.parametrize("local_batch", [4, 5, 7, 8])
def test_the_batch_sizes_satisfy_deepspeed(local_batch):
    """It wants train_batch_size = micro-batch * accumulation * ranks; ours says how many rows at most."""
    values = mapped(local_batch, 3, precision="fp32", accumulation=4)
    micro = values["train_micro_batch_size_per_gpu"]
    assert values["train_batch_size"] == micro * 4 * 3
    assert micro * 4 >= local_batch > (micro - 1) * 4
