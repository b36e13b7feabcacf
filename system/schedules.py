"""Every schedule of a run as a pure function of the step, so that nothing of them needs saving (design,
"The step")."""

import math
from dataclasses import dataclass

from system.config import TrainConfig


@dataclass(frozen=True)
class Scheduled:
    """The scheduled values of one step."""

    lr: float
    momentum: float
    """EMA momentum of the teacher's update after this step."""
    teacher_temperature: float


def cosine_with_warmup(
    step: int, *, peak: float, start: float, final: float, warmup: int, total: int
) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then half a cosine down to `final` (SLIP's
    recipe)."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * progress))


def linear(step: int, *, start: float, end: float, total: float) -> float:
    """Linear from `start` at step 0 to `end` at step `total`, constant after."""
    return end if total <= 0 else start + (end - start) * min(1.0, step / total)


def at(step: int, config: TrainConfig) -> Scheduled:
    """Values for the step that starts after `step` applied steps (0 for the first)."""
    optimizer, teacher, distill, total = (
        config.optimizer,
        config.teacher,
        config.model.distill,
        config.run.steps,
    )
    return Scheduled(
        lr=cosine_with_warmup(
            step,
            peak=optimizer.lr,
            start=optimizer.warmup_lr,
            final=optimizer.final_lr,
            warmup=optimizer.warmup_steps,
            total=total,
        ),
        momentum=linear(step, start=teacher.momentum_start, end=teacher.momentum_end, total=total),
        teacher_temperature=linear(
            step,
            start=distill.teacher_temperature_start,
            end=distill.teacher_temperature,
            total=total * teacher.temperature_warmup,
        ),
    )
