"""What a training run will need: memory, time, bandwidth, checkpoints.

Only memory follows from measurements alone. Time follows from the FLOPs of the method and a stated model
FLOPs utilisation, which holds everything that keeps a GPU from its peak, communication included; saves follow
from stated bandwidths. All that was stated is part of what is printed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.errors import ConfigError
from data_pipeline.catalog import load_dataset
from model.flops import flops_per_pair
from system.checkpoints.interval import Failures
from system.checkpoints.interval import plan as plan_interval
from system.config import TrainConfig
from system.planning.activations import activation_bytes
from system.planning.memory import Memory, Shapes, checkpoint_bytes, rank_memory

Gpu = Literal["a100", "h100", "h200", "b200"]


@dataclass(frozen=True)
class GpuFacts:
    memory_bytes: float
    flops: float
    """Dense products in bf16 and fp16 per second, at the peak that the vendor's data sheet gives."""
    tf32_flops: float
    """The same of fp32 inputs."""


GPUS: dict[Gpu, GpuFacts] = {
    "a100": GpuFacts(80e9, 312e12, 156e12),
    "h100": GpuFacts(80e9, 989e12, 494e12),
    "h200": GpuFacts(141e9, 989e12, 494e12),
    "b200": GpuFacts(180e9, 2250e12, 1125e12),
}
"""80 GB SXM, SXM, SXM, HGX."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is planned for, and what the plan has to be told."""

    gpus: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Ranks."""
    gpu: Gpu = "h100"
    """Of which kind."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.35
    """Share of the peak that the step is taken to reach; measure it on one node, or vary it."""
    caption_tokens: Annotated[int, Field(ge=3)] = 32
    """Columns that the captions of a batch are cut to: the longest one counts."""
    sample_bytes: Annotated[float, Field(ge=0)] = 0.0
    """Stored bytes of a sample; 0: as the manifest of the data set says, which must then be there."""
    gpus_per_node: Annotated[int, Field(ge=1, le=64)] = 8
    """GPUs that share a node's network."""
    store_gb_per_second: Annotated[float, Field(gt=0)] = 1.0
    """What a node writes to the store and reads from it."""
    snapshot_gb_per_second: Annotated[float, Field(gt=0)] = 10.0
    """What a rank copies to host memory."""
    restart_seconds: Annotated[float, Field(ge=0)] = 60.0
    """From a failure to the begin of the restore."""
    settings: tuple[str, ...] = ()
    """key=value of the recipe that the plan takes in its place, such as [data.global_batch=8192]."""


@dataclass(frozen=True)
class Plan:
    stages: dict[int, Memory]
    """By ZeRO stage; offloading and accumulation as the recipe has them."""
    facts: dict[str, Any]
    """Everything else, flat, as `--json` prints it."""


def make_plan(config: TrainConfig, plan: PlanConfig) -> Plan:
    """
    Raises:
        ConfigError: more ranks than samples, or a data set that is not there and no `sample_bytes`.
        DataError: the data set is damaged.
    """
    batch, precision = config.data.global_batch, config.engine.precision
    if plan.gpus > batch:
        raise ConfigError(f"{plan.gpus} ranks for batches of {batch}; lower gpus or raise data.global_batch")
    if plan.caption_tokens > config.model.text.context_length:
        raise ConfigError(
            f"captions have at most {config.model.text.context_length} tokens; lower caption_tokens"
        )
    shapes = Shapes.of(config)
    per_pair = activation_bytes(config.model, precision, plan.caption_tokens)
    stages = {stage: rank_memory(config, shapes, stage, plan.gpus, per_pair) for stage in range(4)}
    hidden = max(1.0, config.model.mlm.mask_ratio * (plan.caption_tokens - 2))
    flops = flops_per_pair(config.model, plan.caption_tokens, hidden).training
    flops += 8 * batch * config.model.embed_dim  # the contrastive products
    gpu = GPUS[plan.gpu]
    peak = gpu.tf32_flops if precision == "fp32" else gpu.flops
    step_seconds = batch * flops / (plan.gpus * peak * plan.mfu)
    seconds = config.run.steps * step_seconds
    sample = plan.sample_bytes or _stored_bytes(config)
    nodes = -(-plan.gpus // plan.gpus_per_node)
    rates = {
        "pairs_per_second": batch / step_seconds,
        "pairs_per_second_per_gpu": batch / step_seconds / plan.gpus,
        "store_bytes_per_second": batch * sample / step_seconds,
        "store_bytes_per_second_per_node": batch * sample / step_seconds / nodes,
        "loader_workers_per_gpu": config.data.loader.workers,
    }
    if config.data.loader.workers:
        rates["pairs_per_second_per_worker"] = rates["pairs_per_second_per_gpu"] / config.data.loader.workers
    facts = {
        **asdict(plan),
        "nodes": nodes,
        "precision": precision,
        "zero_stage": config.engine.zero_stage,
        "global_batch": batch,
        "steps": config.run.steps,
        "parameters": shapes.parameters,
        "flops_per_pair": flops,
        "step_seconds": step_seconds,
        **rates,
        "sample_bytes": sample,
        **_saves(config, plan, shapes, nodes),
        "days": seconds / 86_400,
        "gpu_hours": plan.gpus * seconds / 3_600,
    }
    loss = facts["expected_loss"]
    facts["days_with_saves_and_failures"] = facts["days"] / (1 - loss) if loss < 1 else None
    facts["memory"] = {
        stage: {**asdict(memory), "state": memory.state, "device": memory.device}
        for stage, memory in stages.items()
    }
    facts["device_bytes"] = gpu.memory_bytes
    facts["fits"] = {stage: memory.device < gpu.memory_bytes for stage, memory in stages.items()}
    return Plan(stages, facts)


def _saves(config: TrainConfig, plan: PlanConfig, shapes: Shapes, nodes: int) -> dict[str, float]:
    """Size of a checkpoint, and the interval at which the expected loss is least (Young and Daly)."""
    size = checkpoint_bytes(shapes)
    stall = size / plan.gpus / (plan.snapshot_gb_per_second * 1e9)
    transfer = size / nodes / (plan.store_gb_per_second * 1e9)
    between = 3600 * config.checkpoint.mean_failure_hours
    best = plan_interval(stall, transfer, transfer + plan.restart_seconds, Failures(0.0, 0), between)
    return {
        "checkpoint_bytes": size,
        "checkpoint_stall_seconds": stall,
        "checkpoint_save_seconds": transfer,
        "checkpoint_interval_seconds": best.seconds,
        "mean_failure_hours": config.checkpoint.mean_failure_hours,
        "expected_loss": best.expected_loss,
    }


def _stored_bytes(config: TrainConfig) -> float:
    """Mean over what is trained on."""
    sizes = []
    for part in config.data.parts:
        dataset = load_dataset(part.uri)
        stored = sum(dataset.files[shard.name].size for shard in dataset.shards)
        sizes.append((part.weight, stored / dataset.num_samples))
    return sum(weight * size for weight, size in sizes) / sum(weight for weight, _ in sizes)
