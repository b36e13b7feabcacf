"""Laws of the sample order: each epoch exactly once, no memory of earlier calls, few open shards, O(1)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.order import Located, OrderConfig, SampleOrder


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


@given(case=cases(), step=st.integers(0, 10**9), world=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_parts_of_the_ranks_are_the_batch_at_any_world_size(case: Case, step: int, world: int) -> None:
    order, batch = case.order(), case.batch
    slots = np.concatenate([order.slots(step, part) for part in parts(batch, world)])
    assert np.array_equal(np.sort(slots), np.arange(step * batch, (step + 1) * batch))
    for places in parts(batch, world):
        assert np.array_equal(
            rows(order.locate_places(step, places)), rows(order.locate(order.slots(step, places)))
        )


def parts(batch: int, world: int) -> list[np.ndarray]:
    """The places of each rank, as the loader shares them."""
    share = -(-batch // world)
    return [np.arange(min(r * share, batch), min((r + 1) * share, batch)) for r in range(world)]


@given(
    shards=st.integers(1, 300),
    streams=st.sampled_from([1, 4, 6, 16, 64]),
    window=st.integers(1, 20),
    world=st.integers(1, 9),
    first_step=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_a_rank_keeps_few_shards_open(
    shards: int, streams: int, window: int, world: int, first_step: int
) -> None:
    """Over a stretch as long as a window, a rank meets at most two windows of each of its streams."""
    batch, size = 2 * streams, 50
    order = SampleOrder([size] * shards, OrderConfig(streams=streams, window_shards=window), batch)
    places = parts(batch, world)[0]
    rows_per_batch = batch // order.streams
    steps = max(1, window * size // rows_per_batch * 2 // 3)  # the shortest window
    seen = {
        shard
        for step in range(first_step, first_step + steps)
        for shard in order.locate_places(step, places).shard.tolist()
    }
    streams_of_a_rank = min(order.streams, -(-len(places) // rows_per_batch) + 1)
    # A window has up to one and a half times its shards, and begins and ends within one. Two epochs may meet.
    assert len(seen) <= streams_of_a_rank * 2 * (1.5 * window + 2) + 1


def test_world_8_6_3_8_at_200_cuts_is_the_uninterrupted_sequence() -> None:
    """A run that is cut at 200 random steps and goes on at another world size and with another number of
    workers consumes, slot by slot, what one that nobody cut does."""
    sizes, cfg, batch, steps = [37, 5, 64, 11, 80, 41], OrderConfig(seed=3, streams=8), 24, 1200
    whole = rows(SampleOrder(sizes, cfg, batch).locate(np.arange(steps * batch)))
    rng = np.random.default_rng(0)
    cuts = [0, *np.sort(rng.choice(np.arange(1, steps), 200, replace=False)).tolist(), steps]
    seen = np.full((steps * batch, 3), -1)
    for attempt, (first, last) in enumerate(pairwise(cuts)):
        world, workers = (8, 6, 3, 8)[attempt % 4], attempt % 5
        for places in parts(batch, world):
            for worker in range(max(1, workers)):  # each is a process that knows nothing of the others
                order = SampleOrder(sizes, cfg, batch)
                for step in range(first + worker, last, max(1, workers)):
                    slots = order.slots(step, places)
                    assert np.all(seen[slots] == -1)  # never twice
                    seen[slots] = rows(order.locate_places(step, places))
    assert np.array_equal(seen, whole)


def test_seed_and_epoch_change_the_order() -> None:
    sizes, batch = [50] * 20, 40
    order = SampleOrder(sizes, OrderConfig(streams=8), batch)
    epochs = [rows(order.locate(np.arange(e * 1000, (e + 1) * 1000)))[:, 1:] for e in range(2)]
    other = rows(SampleOrder(sizes, OrderConfig(seed=1, streams=8), batch).locate(np.arange(1000)))[:, 1:]
    assert np.mean(np.all(epochs[0] == epochs[1], axis=1)) < 0.02
    assert np.mean(np.all(epochs[0] == other, axis=1)) < 0.02


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1000, 1001])
def test_windows_of_16_shards_mix_like_a_uniform_shuffle(seed: int, size: int) -> None:
    """Pairs of one batch from the same shard, and the correlation of neighbours, within 5 % of uniform."""
    shards, batch = 64, 256
    order = SampleOrder([size] * shards, OrderConfig(seed=seed, streams=64, window_shards=16), batch)
    steps = shards * size // batch
    located = order.locate(np.arange(steps * batch))
    same = sum(
        np.sum(np.bincount(one) * (np.bincount(one) - 1)) for one in located.shard.reshape(steps, batch)
    )
    uniform = steps * batch * (batch - 1) * (size - 1) / (shards * size - 1)
    assert 0.95 < same / uniform < 1.05
    position = located.shard * size + located.index
    assert abs(np.corrcoef(position[:-1], position[1:])[0, 1]) < 0.05


def test_a_small_data_set_has_fewer_streams_rather_than_short_windows() -> None:
    cfg = OrderConfig(streams=64, window_shards=16)
    found = [SampleOrder([10] * shards, cfg, 64).streams for shards in (1, 31, 32, 64, 200, 1023, 1024, 5000)]
    assert found == [1, 1, 2, 4, 8, 32, 64, 64]
    assert SampleOrder([10, 0, 0] * 64, cfg, 64).streams == 4  # shards without samples are none


def test_threads_may_share_an_order() -> None:
    order, slots = SampleOrder([20] * 40, OrderConfig(streams=8), 40), np.arange(0, 80_000, 7)
    expected = rows(SampleOrder([20] * 40, OrderConfig(streams=8), 40).locate(slots))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda part: rows(order.locate(part)), np.array_split(slots, 50)))
    assert np.array_equal(np.concatenate(found), expected)


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
