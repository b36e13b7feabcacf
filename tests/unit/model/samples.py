"""Small batches and models for the tests of the model, and ranks that are threads of one process."""

from collections.abc import Callable
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, preset
from model.objective import Objective
from model.teacher import Teacher


def make_tokens(lengths: list[int], config: ModelConfig, seed: int = 0) -> Tensor:
    """Captions with the given numbers of words, padded with 0 to the context length."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), config.text.context_length, dtype=torch.int64)
    for row, words in zip(tokens, lengths, strict=True):
        row[0] = config.text.start_token
        row[1 : 1 + words] = torch.randint(1, config.text.start_token, (words,), generator=generator)
        row[1 + words] = config.text.end_token
    return tokens


def make_batch(config: ModelConfig, size: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch as the loader gives it, all weights 1."""
    generator = torch.Generator().manual_seed(seed)
    side = config.vision.image_size
    lengths = [2 + (5 * index + seed) % 9 for index in range(size)]
    return {
        "image": torch.randint(0, 256, (size, 3, side, side), generator=generator, dtype=torch.uint8),
        "tokens": make_tokens(lengths, config, seed),
        "id": torch.randint(0, 2**62, (size,), generator=generator),
        "epoch": torch.zeros(size, dtype=torch.int64),
        "weight": torch.ones(size),
    }


def make_config(distill_weight: float = 0.05, mlm_weight: float = 0.05) -> ModelConfig:
    config = preset("test")
    distill, mlm = replace(config.distill, weight=distill_weight), replace(config.mlm, weight=mlm_weight)
    return replace(config, distill=distill, mlm=mlm)


def make_pair(config: ModelConfig) -> tuple[Objective, Teacher]:
    """Student, and a teacher that is another student (so that the two differ, as they do in a run)."""
    teacher = Teacher(config)
    teacher.load_student(Objective(config, seed=2))
    return Objective(config, seed=1), teacher


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter (all have one)."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        found[name] = parameter.grad.clone()
    return found


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = (value.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp(min=1e-30))


class ThreadRank:
    """`Collectives` of one rank among threads."""

    def __init__(self, rank: int, size: int, barrier: Barrier, slots: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._slots = barrier, slots

    def exchange(self, x: Tensor) -> list[Tensor]:
        self._slots[self.rank] = x.detach().clone()
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()
        return everyone

    def rotate(self, x: Tensor) -> Tensor:
        return self.exchange(x)[self.rank - 1]

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.exchange(x)).sum(dim=0)


def on_ranks(size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """What `work` returns on each of `size` ranks."""
    barrier, slots = Barrier(size), [None] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(rank, size, barrier, slots))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
