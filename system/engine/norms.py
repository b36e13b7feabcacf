"""Norms of gradients and weights by tower, and how far student and teacher are apart.

Computed every few steps from the fragments that a rank holds, so it is the same at any ZeRO stage: one pass
over them and one all-reduce of a few numbers, without waiting for the device.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from system.engine.engine import Engine
from system.engine.fragments import Fragment
from system.engine.teacher_state import ShardedTeacher

TOWERS = ("vision", "text", "heads")
_TOWER_OF = {"vision": 0, "image_projection": 0, "text": 1, "text_projection": 1}


class TowerNorms:
    def __init__(self, engine: Engine, teacher: ShardedTeacher, every: int) -> None:
        """`every` counts steps; 0: never."""
        self._engine, self._teacher, self._every = engine, teacher, every
        self._gradients_T: Tensor | None = None

    def measurement(self, step: int) -> Callable[[], None] | None:
        """What `Engine.step` shall call between backward and update in the step after `step` applied ones."""
        return self._measure_gradients if self._every and step % self._every == 0 else None

    @torch.no_grad()
    def _measure_gradients(self) -> None:
        pairs = [(f, g) for f in self._engine.fragments if (g := self._engine.gradient(f)) is not None]
        self._gradients_T = _squares_T(pairs, self._engine.device)

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """After an applied step, on all ranks: scalars on the device by name; none if this was no step to
        measure."""
        if self._gradients_T is None:
            return {}
        gradients_T, self._gradients_T = self._gradients_T, None
        weights = ((f, f.saved(f.state["master"])) for f in self._engine.fragments)
        weights_T = _squares_T(weights, self._engine.device)
        sums = torch.cat([gradients_T, weights_T, self._overlap_3()])
        dist.all_reduce(sums)
        named = {f"grad_norm_{tower}": square for tower, square in zip(TOWERS, sums[:3], strict=True)}
        named |= {f"param_norm_{tower}": square for tower, square in zip(TOWERS, sums[3:6], strict=True)}
        values = {name: square.sqrt().float() for name, square in named.items()}
        if self._teacher.masters:
            values["teacher_cosine"] = (sums[6] / (sums[7] * sums[8]).sqrt()).float()
        return values

    def _overlap_3(self) -> Tensor:
        """Of the shared parameters: student times teacher, and the squares of both."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._engine.device)
        for fragment, master in zip(self._teacher.held, self._teacher.masters, strict=True):
            student, teacher = fragment.saved(fragment.state["master"]), fragment.saved(master)
            parts = torch.stack([student @ teacher, student @ student, teacher @ teacher])
            sums += parts.to(sums.device, torch.float64, non_blocking=True)
        return sums


def _squares_T(pairs: Iterable[tuple[Fragment, Tensor]], device: torch.device) -> Tensor:
    """Sums of squares by tower, float64 [3]."""
    by_tower: tuple[list[Tensor], ...] = ([], [], [])
    for fragment, flat in pairs:
        by_tower[_TOWER_OF.get(fragment.parameter.split(".")[0], 2)].append(flat)
    sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in by_tower]
    for flats, total in zip(by_tower, sums, strict=True):
        if flats:
            norms = [torch.linalg.vector_norm(flat, dtype=torch.float32) for flat in flats]
            total += torch.stack(norms).double().square().sum().to(device, non_blocking=True)
    return torch.stack(sums)
