"""Our engine configuration as DeepSpeed's dictionary: one pure function."""

from typing import Any

from system.config import TrainConfig


def deepspeed_config(config: TrainConfig, local_batch: int, world_size: int) -> dict[str, Any]:
    """
    Args:
        local_batch: samples that one rank computes per step, padding included.

    The learning rate is set by the trainer before each step, so there is no scheduler section. DeepSpeed
    averages gradients over ranks; the loss terms are scaled for that (model/losses.py).
    """
    bf16 = config.engine.precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": local_batch * world_size,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": {"stage": config.engine.zero_stage, "overlap_comm": False},
        # A step whose gradient is not finite must be refused, never applied.
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        # Gradients are summed over ranks in fp32 whatever the training precision.
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
