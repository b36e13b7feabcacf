"""The teacher's average over a long run: fp32 holds it, bf16 does not."""

import torch

from model.teacher import ema_update_
from system.schedules import linear
from tests.unit.model.samples import relative_error

STEPS = 10_000


def test_ten_thousand_steps_are_the_float64_recurrence_to_fp32_rounding():
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(50, generator=generator), torch.randn(4, 7, generator=generator)]
    teacher = [tensor.clone() for tensor in student]
    exact = [tensor.double() for tensor in student]
    for step in range(STEPS):
        momentum = linear(step, start=0.999, end=0.9999, total=STEPS)
        for tensor in student:  # as under Adam: every weight moves a little at each step
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-2)
        ema_update_(teacher, student, momentum)
        for old, new in zip(exact, student, strict=True):
            old.mul_(momentum).add_(new.double(), alpha=1 - momentum)
    # A step rounds once, by half a unit in the last place (6e-8); 5,000 such errors are alive at the end, and
    # being of either sign they add up to some 20 of them.
    assert all(relative_error(*pair) <= 3e-6 for pair in zip(teacher, exact, strict=True))
    assert all(relative_error(*pair) > 0.01 for pair in zip(teacher, student, strict=True))  # it does lag


def test_a_bf16_accumulator_stalls_where_fp32_goes_on():
    """Why the masters of the teacher are fp32: at momentum 0.9999 the increment is below half a unit in the
    last place of bf16, unless the student is some twenty times larger than the teacher."""
    student, momentum = 1.5, 0.9999
    exact, teachers = 1.0, {dtype: torch.ones(3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(STEPS):
        exact = momentum * exact + (1 - momentum) * student
        for dtype, teacher in teachers.items():
            ema_update_([teacher], [torch.full((3,), student, dtype=dtype)], momentum)
    assert 1.31 < exact < 1.32
    assert torch.allclose(teachers[torch.float32], torch.tensor(exact), rtol=1e-4)
    assert torch.equal(teachers[torch.bfloat16], torch.ones(3, dtype=torch.bfloat16))
