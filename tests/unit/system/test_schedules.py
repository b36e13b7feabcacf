"""Schedules are functions of the step and nothing else."""

from itertools import pairwise

import pytest

from system.config import load_train_recipe
from system.schedules import at, cosine_with_warmup, linear
from tests.unit.system.test_config import EMOJI


def test_warmup_peak_and_end():
    values = [
        cosine_with_warmup(step, peak=1.0, start=0.1, final=0.01, warmup=10, total=100) for step in range(101)
    ]
    assert values[0] == pytest.approx(0.1)
    assert values[10] == pytest.approx(1.0)
    assert max(values) == values[10]
    assert values[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert cosine_with_warmup(500, peak=1.0, start=0.1, final=0.01, warmup=10, total=100) == pytest.approx(
        0.01
    )


def test_no_warmup_begins_at_the_peak():
    assert cosine_with_warmup(0, peak=1.0, start=0.1, final=0.0, warmup=0, total=10) == 1.0


def test_linear_ends_and_stays():
    assert linear(0, start=0.04, end=0.07, total=10) == pytest.approx(0.04)
    assert linear(10, start=0.04, end=0.07, total=10) == linear(99, start=0.04, end=0.07, total=10) == 0.07
    assert linear(0, start=0.04, end=0.07, total=0) == 0.07


def test_momentum_and_temperature_rise_over_the_run():
    config = load_train_recipe(EMOJI, [])
    first, last = at(0, config), at(config.run.steps, config)
    assert first.momentum == config.teacher.momentum_start
    assert last.momentum == pytest.approx(config.teacher.momentum_end)
    assert first.teacher_temperature == config.model.distill.teacher_temperature_start
    assert last.teacher_temperature == config.model.distill.teacher_temperature
    assert at(7, config) == at(7, config)
