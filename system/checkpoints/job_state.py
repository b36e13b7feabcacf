"""The state of a running job as named runs of fp32 values: what a save writes and a restore fills."""

import torch
import torch.distributed as dist

from system.checkpoints.state_digest import add, run_sum
from system.engine.engine import Engine
from system.engine.teacher_state import ShardedTeacher

CENTRE = ("state", "teacher.centre", 0)


class JobState:
    def __init__(self, engine: Engine, teacher: ShardedTeacher) -> None:
        self._engine, self._teacher = engine, teacher
        self.shapes = engine.shapes

    @property
    def _centre(self) -> torch.Tensor | None:
        """Of the teacher's logits, where there are some."""
        module = self._teacher.module
        return module.centre if module is not None and module.centre.numel() else None

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """The runs that this rank writes, as flat fp32 views of the state."""
        tensors = {}
        teacher = {
            f.parameter: master for f, master in zip(self._teacher.held, self._teacher.masters, strict=True)
        }
        for fragment in self._engine.fragments:
            kinds = dict(fragment.state)
            if fragment.parameter in teacher:
                kinds["teacher"] = teacher[fragment.parameter]
            for kind, values in kinds.items():
                run = fragment.saved(values)
                if run.numel():
                    tensors[f"{kind}/{fragment.parameter}/{fragment.saved_start}"] = run.detach()
        if self._centre is not None and dist.get_rank() == 0:
            tensors["/".join(map(str, CENTRE))] = self._centre.detach().view(-1)
        return tensors

    def targets(self) -> list[tuple[tuple[str, str, int, int], torch.Tensor]]:
        """((kind, parameter, start, length), flat view) of everything that this rank holds."""
        found = []
        for fragment in self._engine.fragments:
            for kind, values in fragment.state.items():
                found.append(((kind, fragment.parameter, fragment.start, fragment.length), values))
        for fragment, master in zip(self._teacher.held, self._teacher.masters, strict=True):
            found.append((("teacher", fragment.parameter, fragment.start, fragment.length), master))
        if self._centre is not None:
            found.append(((*CENTRE, self._centre.numel()), self._centre.view(-1)))
        return found

    def filled(self, step: int) -> None:
        """After the targets were filled: refresh what computes from them."""
        self._engine.finish_restore(step)
        self._teacher.refresh()

    def digest(self) -> str:
        """Over all ranks, each element counted once; free of topology."""
        total = 0
        for name, values in self.saved_tensors().items():
            kind, parameter, start = name.split("/")
            if kind in ("master", "teacher"):
                counted = parameter if kind == "master" else f"teacher/{parameter}"
                total += run_sum(counted, int(start), values.cpu().numpy())
        sums: list = [None] * dist.get_world_size()
        dist.all_gather_object(sums, total)
        return add(sums)
