"""Laws of the keyed numbers: reproducible, uniform, and a permutation is a bijection."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.keyed import MASK_64, mix, permute, shuffled, uniform, unpermute


@given(n=st.integers(1, 5000), key=st.integers(0, MASK_64))
@settings(max_examples=150, deadline=None)
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    image = permute(np.arange(n), n, key)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


@given(n=st.integers(1, 2**62), key=st.integers(0, MASK_64), data=st.data())
@settings(max_examples=100, deadline=None)
def test_unpermute_takes_permute_back(n: int, key: int, data: st.DataObject) -> None:
    x = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    assert np.array_equal(unpermute(permute(x, n, key), n, key), x)
    assert np.array_equal(permute(unpermute(x, n, key), n, key), x)


@given(n=st.integers(1, 3000), key=st.integers(0, MASK_64))
@settings(max_examples=60, deadline=None)
def test_shuffled_is_an_order_of_all_points(n: int, key: int) -> None:
    order = shuffled(n, key)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_every_shuffle_of_four_is_equally_likely() -> None:
    orders = np.array([shuffled(4, int(key)) for key in mix(7, np.arange(12_000))])
    counts = np.array([np.sum(np.all(orders == order, axis=1)) for order in permutations(range(4))])
    assert counts.sum() == 12_000
    assert float(np.sum((counts - 500) ** 2 / 500)) < 49.7  # as above


@given(n=st.integers(2**40, 2**62), key=st.integers(0, MASK_64), start=st.integers(0, 2**40 - 2000))
@settings(max_examples=50, deadline=None)
def test_permutation_of_a_huge_range_stays_inside_and_never_repeats(n: int, key: int, start: int) -> None:
    image = permute(np.arange(start, start + 2000), n, key)
    assert np.unique(image).size == 2000
    assert image.min() >= 0
    assert image.max() < n


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_mixed_sizes_and_keys_equal_one_permutation_at_a_time(data: st.DataObject) -> None:
    cases = data.draw(
        st.lists(st.tuples(st.integers(1, 10**9), st.integers(0, MASK_64)), min_size=1, max_size=20)
    )
    x = np.array([data.draw(st.integers(0, n - 1)) for n, _ in cases])
    together = permute(x, np.array([n for n, _ in cases]), np.array([key for _, key in cases], np.uint64))
    alone = [int(permute(np.array(value), n, key)) for value, (n, key) in zip(x, cases, strict=True)]
    assert together.tolist() == alone


def test_every_order_of_four_is_equally_likely() -> None:
    keys = mix(7, np.arange(24_000))
    images = permute(np.arange(4)[None, :], 4, keys[:, None])
    counts = np.array([np.sum(np.all(images == order, axis=1)) for order in permutations(range(4))])
    chi_square = float(np.sum((counts - 1000) ** 2 / 1000))
    assert counts.sum() == 24_000
    assert chi_square < 49.7  # the 99.9th percentile at 23 degrees of freedom; the keys are fixed


def test_neighbours_and_keys_are_unrelated() -> None:
    n = 100_000
    first, second = permute(np.arange(n), n, 1), permute(np.arange(n), n, 2)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.015
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.015


def test_a_point_outside_the_range_is_refused() -> None:
    for x in (-1, 5):
        with pytest.raises(ValueError, match="must lie in"):
            permute(np.array([x]), 5, 0)
    with pytest.raises(ValueError, match=r"x must lie in \[0, n\)"):
        permute(np.arange(1), 0, 1)


def test_mix_depends_on_order_sign_and_every_part() -> None:
    assert mix(1, 2) != mix(2, 1)
    assert mix(0) != mix(0, 0)
    assert mix(-1) == mix(MASK_64)
    parts = np.arange(1000)
    assert np.unique(mix(3, parts[:, None], parts[None, :])).size == 10**6
    assert np.array_equal(mix(3, parts), np.array([mix(3, int(part)) for part in parts]))
    with pytest.raises(TypeError, match="integers"):
        mix(np.array([0.5]))


def test_splitmix64_has_its_published_values() -> None:
    # The first outputs of SplitMix64 from seed 0 are the finaliser at 0, golden, 2 golden.
    golden = 0x9E3779B97F4A7C15
    outputs = [int(mix(step * golden)) for step in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniform_is_pure_and_uniform() -> None:
    draws = uniform(5, 3, np.arange(100_000), 0)
    assert np.array_equal(draws[::-1], uniform(5, 3, np.arange(100_000)[::-1], 0))
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert np.all(np.abs(np.histogram(draws, 20, (0, 1))[0] - 5000) < 300)
    others = uniform(5, 4, np.arange(100_000), 0), uniform(5, 3, np.arange(100_000), 1)
    assert all(abs(np.corrcoef(draws, other)[0, 1]) < 0.015 for other in others)
