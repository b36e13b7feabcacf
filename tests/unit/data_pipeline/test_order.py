"""Laws of the sample order: each epoch exactly once, no memory of earlier calls, few open shards, O(1)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Located, OrderConfig, SampleOrder


def rows(located: Located) -> np.ndarray:
    return np.stack(located, axis=-1)


class Case(NamedTuple):
    sizes: list[int]
    cfg: OrderConfig
    batch: int

    def order(self) -> SampleOrder:
        return SampleOrder(self.sizes, self.cfg, self.batch)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum))
    streams = draw(st.integers(1, 70))
    batch = streams * draw(st.integers(1, 4))
    cfg = OrderConfig(
        seed=draw(st.integers(0, 2**40)), streams=streams, window_shards=draw(st.integers(1, 5))
    )
    return Case(sizes, cfg, batch)


@given(case=cases(), epochs=st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_every_epoch_holds_every_sample_once(case: Case, epochs: int) -> None:
    order = case.order()
    n, b = order.num_samples, order.global_batch
    batches = -(-epochs * n // b)  # enough whole batches to cover the epochs
    located = order.locate(np.arange(batches * b))
    seen = rows(located)
    assert np.all(located.index < np.array(case.sizes)[located.shard])
    for epoch in range(epochs):
        samples = seen[located.epoch == epoch]
        assert len(samples) == n
        assert len(np.unique(samples, axis=0)) == n
    # Only the epoch that is under way may be incomplete.
    assert located.epoch.max() <= epochs + b // n + 1


@given(case=cases(), slots=st.lists(st.integers(0, 10**12), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_slot_means_the_same_whatever_was_asked_before(case: Case, slots: list[int]) -> None:
    alone, order = case.order(), case.order()
    one_by_one = np.concatenate([rows(alone.locate(np.array([slot]))) for slot in reversed(slots)])[::-1]
    assert np.array_equal(rows(order.locate(np.array(slots))), one_by_one)


def test_a_batch_is_a_prefix_of_the_epoch_at_any_time() -> None:
    """Stopping after any step loses and repeats nothing: consumed samples are a set of k*B different ones."""
    order = SampleOrder([37, 5, 64, 11], OrderConfig(streams=8), 24)
    for step in range(1, order.num_samples // 24 + 1):
        assert len(np.unique(rows(order.locate(np.arange(step * 24))), axis=0)) == step * 24


def test_another_global_batch_consumes_the_same_prefix() -> None:
    cfg = OrderConfig(streams=8)
    small, large = (SampleOrder([37, 5, 64, 11], cfg, batch) for batch in (16, 24))
    for slots in (48, 96, 480):
        left, right = (np.unique(rows(order.locate(np.arange(slots))), axis=0) for order in (small, large))
        assert np.array_equal(left, right)


def test_far_slots_of_a_huge_data_set_are_located_directly() -> None:
    order = SampleOrder([10_000] * 100_000, OrderConfig(), 32_768)
    first = 10**12 // 32_768 * 32_768 + 32_768
    located = order.locate(np.arange(first, first + 32_768))
    assert set(located.epoch.tolist()) == {1000}
    assert len(np.unique(rows(located), axis=0)) == 32_768
    order.locate(np.array([2**61]))


@pytest.mark.parametrize("world", [1, 4, 5])
def test_a_rank_keeps_few_shards_open(world: int) -> None:
    cfg = OrderConfig(streams=16, window_shards=4)
    batch, shard = 64, 100
    order = SampleOrder([shard] * 256, cfg, batch)
    chunk = -(-batch // world)
    steps_per_window = cfg.window_shards * shard * cfg.streams // batch
    streams_of_a_rank = -(-chunk // (batch // cfg.streams)) + 1  # its part may begin and end inside a stream
    for first_step in (0, 50, 137):
        steps = np.arange(first_step, first_step + steps_per_window)[:, None]
        slots = steps * batch + np.arange(chunk)[None, :]
        located = order.locate(slots.ravel())
        # A stretch as long as a window touches two windows, each of at most window_shards + 1 shards.
        assert np.unique(located.shard).size <= streams_of_a_rank * 2 * (cfg.window_shards + 1)


def test_seed_and_epoch_change_the_order() -> None:
    sizes, batch = [50] * 20, 40
    order = SampleOrder(sizes, OrderConfig(streams=8), batch)
    epochs = [rows(order.locate(np.arange(e * 1000, (e + 1) * 1000)))[:, 1:] for e in range(2)]
    other = rows(SampleOrder(sizes, OrderConfig(seed=1, streams=8), batch).locate(np.arange(1000)))[:, 1:]
    assert np.mean(np.all(epochs[0] == epochs[1], axis=1)) < 0.02
    assert np.mean(np.all(epochs[0] == other, axis=1)) < 0.02


def test_a_batch_mixes_the_data_set_like_a_uniform_shuffle() -> None:
    """Pairs of one batch that come from the same shard: not more than a uniform shuffle gives."""
    shards, size, batch = 64, 200, 64
    order = SampleOrder([size] * shards, OrderConfig(streams=64), batch)
    steps = shards * size // batch
    shard = order.locate(np.arange(steps * batch)).shard.reshape(steps, batch)
    same = sum(np.sum(np.bincount(one) * (np.bincount(one) - 1)) for one in shard)
    uniform = steps * batch * (batch - 1) * (size - 1) / (shards * size - 1)
    assert same / uniform < 1.05


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of 64 streams"):
        SampleOrder([10], OrderConfig(), 100)
    with pytest.raises(ValueError, match="not a multiple"):
        SampleOrder([10], OrderConfig(), 32)
    for sizes in ([], [0, 0]):
        with pytest.raises(ValueError, match="no samples"):
            SampleOrder(sizes, OrderConfig(), 64)
    with pytest.raises(ValueError, match="start at 0"):
        SampleOrder([10], OrderConfig(), 64).locate(np.array([-1]))
    with pytest.raises(ValueError, match="streams is 0"):
        OrderConfig(streams=0)
