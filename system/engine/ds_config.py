"""Our engine configuration as DeepSpeed's dictionary: one pure function."""

from typing import Any

from system.config import TrainConfig


def deepspeed_config(config: TrainConfig, local_batch: int, world_size: int) -> dict[str, Any]:
    """
    Args:
        local_batch: samples that one rank computes per step, padding included.

    The learning rate is set by the trainer before each step, so there is no scheduler section. DeepSpeed
    averages gradients over ranks; the loss terms are scaled for that (model/losses.py), and so that the
    gradients of micro-batches are summed.
    """
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage, "overlap_comm": False}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    micro_batch = -(-local_batch // engine.accumulation)
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": engine.accumulation,
        "train_batch_size": micro_batch * engine.accumulation * world_size,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": zero,
        # A step whose gradient is not finite must be refused, never applied.
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": True},
        # Every overflow halves the scale, so that a step that is tried again is not tried in vain.
        "fp16": {
            "enabled": engine.precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 1,
            "min_loss_scale": 1,
        },
        # Gradients are summed over ranks in fp32 whatever the training precision.
        "communication_data_type": "fp32",
        # Ours is torch's AdamW, whose kernel for the CPU needs no compiler (docs/decisions/0007).
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if engine.accumulation > 1:
        # And so are those of micro-batches.
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    return values
