"""Laws of the simulator: it sums up, it is the closed form where that holds, and it loses what it must."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulate import Costs, poisson, simulate

COSTS = Costs(
    step_seconds=0.5, waiting_seconds=0.01, stall_seconds=0.2, save_seconds=10, restart_seconds=60,
    restore_seconds=15,
)  # fmt: skip
_SECONDS = st.floats(0.001, 100)


def test_without_a_failure_it_is_arithmetic():
    found = simulate(COSTS, interval_seconds=25.5, steps=100, lifetimes=[])
    assert found.failures == 0
    assert found.seconds["productive"] == pytest.approx(50.0)
    assert found.seconds["data_wait"] == pytest.approx(1.0)
    assert found.seconds["start_up"] == 60.0
    assert found.seconds["restore"] == 0.0
    # One save in the middle, 50 steps after the start; the last one is waited for.
    assert found.seconds["checkpoint_stall"] == pytest.approx(0.2 + 10)


def test_a_failure_costs_what_was_not_committed():
    """A save at 10.2 s that lasts until 20.2 s: a failure before that loses everything, one after it what
    came since. Two saves were begun by then."""
    costs = Costs(**{**COSTS.__dict__, "restart_seconds": 0.0, "restore_seconds": 0.0})
    early = simulate(costs, 10.2, 1000, [20.0])
    late = simulate(costs, 10.2, 1000, [21.0])
    assert early.seconds["lost_work"] == pytest.approx(20.0 - 0.2)
    assert late.seconds["lost_work"] == pytest.approx(21.0 - 0.4 - 10.2)
    assert early.seconds["productive"] == late.seconds["productive"] == pytest.approx(500.0)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        Costs, step_seconds=_SECONDS, waiting_seconds=_SECONDS, stall_seconds=_SECONDS, save_seconds=_SECONDS,
        restart_seconds=_SECONDS, restore_seconds=_SECONDS,
    ),
    st.floats(0.1, 1000),
    st.integers(1, 500),
    st.lists(st.floats(0, 1000), max_size=20),
)  # fmt: skip
def test_no_second_is_lost_or_counted_twice(costs, interval, steps, lifetimes):
    found = simulate(costs, interval, steps, lifetimes)
    assert min(found.seconds.values()) > -1e-6
    assert found.seconds["productive"] == pytest.approx(steps * costs.step_seconds)
    assert found.failures <= len(lifetimes)
    # Every failure ends an attempt exactly at the end of its lifetime.
    assert found.wall_seconds >= sum(lifetimes[: found.failures]) - 1e-6


@pytest.mark.parametrize("hours", [0.5, 2.0, 8.0])
def test_many_failures_give_the_closed_form(hours):
    """Young and Daly to first order: stalls, half an interval and the save's flight per failure, restarts."""
    between, steps = 3600 * hours, 40_000_000
    interval = math.sqrt(2 * COSTS.stall_seconds * between)
    found = simulate(COSTS, interval, steps, poisson(between, seed=1))
    per_failure = interval / 2 + COSTS.save_seconds + COSTS.restart_seconds + COSTS.restore_seconds
    useful = COSTS.step_seconds / (COSTS.step_seconds + COSTS.waiting_seconds)
    expected = useful * (1 - COSTS.stall_seconds / interval - per_failure / between)
    assert found.failures > 500
    assert found.goodput == pytest.approx(expected, abs=0.004)


def test_a_run_that_cannot_come_forward_is_an_error():
    with pytest.raises(ValueError, match="no end in sight"):
        simulate(COSTS, 30.0, 1000, poisson(20.0, seed=0))
