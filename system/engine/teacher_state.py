"""The sharded EMA teacher: an fp32 master in fragments aligned with the optimizer's, and a compute copy.

The master's update is local to each rank (one foreach lerp) and costs 4/W bytes a parameter at stages 1 to
3, in host memory where the optimizer is offloaded. The compute copy, in the training precision, is refreshed
from it with one all-gather. It is whole on every rank at stage 3 too, 2 bytes for each parameter of the
vision tower and the quantizer (4 in fp32), and as much again while it is refreshed. An accumulator in bf16
would stall: at momentum 0.9999 the increment is below half an ulp (design, "The teacher").
"""

import torch
import torch.distributed as dist

from model.teacher import Teacher, ema_update_
from system.engine.fragments import Fragment


class ShardedTeacher:
    def __init__(self, teacher: Teacher | None, fragments: list[Fragment]) -> None:
        """
        Args:
            teacher: compute copy on its device, in the training precision; its parameter names are the
                student's. None when distillation is off: then there is nothing to keep.
            fragments: what this rank holds of the student.
        """
        self.module = teacher
        self._copies = {n: p.detach().view(-1) for n, p in teacher.named_parameters()} if teacher else {}
        self.held = [fragment for fragment in fragments if fragment.parameter in self._copies]
        self.masters = [fragment.state["master"].clone() for fragment in self.held]
        layout = [(fragment.parameter, fragment.start, fragment.length) for fragment in self.held]
        self._layouts: list[list[tuple[str, int, int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(self._layouts, layout)
        # Decided from what all ranks said, so that no rank skips an all-gather that another enters.
        total = sum(copy.numel() for copy in self._copies.values())
        self._replicated = all(sum(length for _, _, length in held) == total for held in self._layouts)
        self.refresh()

    @torch.no_grad()
    def update(self, momentum: float, centre_K: torch.Tensor | None, centre_momentum: float) -> None:
        """One EMA step after an applied optimizer step: master <- master + (1 - momentum) * (student -
        master)."""
        if self.module is None:
            return
        if self.masters:
            ema_update_(self.masters, (fragment.state["master"] for fragment in self.held), momentum)
        if centre_K is not None:
            self.module.update_centre_(centre_K, centre_momentum)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the compute copy up to date with the masters of all ranks."""
        if self._replicated:
            for fragment, master in zip(self.held, self.masters, strict=True):
                self._copies[fragment.parameter].copy_(master)
            return
        example = next(iter(self._copies.values()))
        lengths = [sum(length for _, _, length in layout) for layout in self._layouts]
        mine = example.new_zeros(max(lengths))
        if self.masters:
            mine[: lengths[dist.get_rank()]] = torch.cat(self.masters).to(mine.dtype)
        everyone = mine.new_empty(len(lengths) * mine.numel())
        dist.all_gather(list(everyone.chunk(len(lengths))), mine)
        for rank, layout in enumerate(self._layouts):
            position = rank * mine.numel()
            for name, start, length in layout:
                self._copies[name][start : start + length] = everyone[position : position + length]
                position += length
