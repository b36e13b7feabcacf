"""Laws of a weighted mix: exact shares in every batch, every data set in its own order, free of
topology."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.manifest import sha256_file
from data_pipeline.catalog import load_dataset
from data_pipeline.image.augment import AugmentConfig
from data_pipeline.loading.loader import Loader, LoaderConfig
from data_pipeline.loading.mixing import MixedOrder, MixLocated, MixPart, keyed_ids, mix_digest
from data_pipeline.loading.order import OrderConfig, SampleOrder
from data_pipeline.records import sample_id
from system.config import DataConfig, load_train_recipe
from tests.support.paths import ROOT
from tests.support.small_dataset import write_dataset

EMOJI = str(ROOT / "configs" / "emoji.yaml")


class Case(NamedTuple):
    sizes: list[list[int]]
    weights: list[int]
    cfg: OrderConfig
    batch: int

    def order(self) -> MixedOrder:
        return MixedOrder(self.sizes, self.weights, self.cfg, self.batch)

    def shares(self) -> list[int]:
        return [weight // math.gcd(*self.weights) for weight in self.weights]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 4))
    sizes = draw(
        st.lists(
            st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(sum), min_size=count, max_size=count
        )
    )
    weights = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    streams = draw(st.integers(1, 12))
    period = math.lcm(streams, sum(weights) // math.gcd(*weights))
    cfg = OrderConfig(
        seed=draw(st.integers(0, 2**40)), streams=streams, window_shards=draw(st.integers(1, 4))
    )
    return Case(sizes, weights, cfg, period * draw(st.integers(1, 3)))


def rows(located: MixLocated) -> np.ndarray:
    return np.stack(located, axis=-1)


@given(case=cases(), step=st.integers(0, 10**9))
@settings(max_examples=80, deadline=None)
def test_every_batch_holds_exactly_the_shares(case: Case, step: int) -> None:
    slots = np.arange(step * case.batch, (step + 1) * case.batch)
    counts = np.bincount(case.order().locate(slots).dataset, minlength=len(case.weights))
    assert counts.tolist() == [case.batch // sum(case.shares()) * share for share in case.shares()]


@given(case=cases(), steps=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_each_data_set_is_gone_through_once_an_epoch(case: Case, steps: int) -> None:
    """The samples of one data set are a prefix of its own epochs, whatever stands between them."""
    found = rows(case.order().locate(np.arange(steps * case.batch)))
    for number, sizes in enumerate(case.sizes):
        own = found[found[:, 0] == number][:, 1:]
        assert np.unique(own, axis=0).shape == own.shape  # nothing twice in one epoch
        assert np.all(own[:, 2] < np.array(sizes)[own[:, 1]])
        full, rest = divmod(len(own), sum(sizes))
        counts = np.bincount(own[:, 0], minlength=full + 1)
        assert counts.tolist() == [sum(sizes)] * full + [rest]


@given(case=cases(), step=st.integers(0, 10**9), world=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_places_of_any_world_are_the_slots_of_the_batch(case: Case, step: int, world: int) -> None:
    order, share = case.order(), -(-case.batch // world)
    parts = [
        np.arange(min(rank * share, case.batch), min((rank + 1) * share, case.batch)) for rank in range(world)
    ]
    slots = np.concatenate([order.slots(step, part) for part in parts])
    assert np.array_equal(np.sort(slots), np.arange(step * case.batch, (step + 1) * case.batch))
    located = np.concatenate([rows(order.locate_places(step, part)) for part in parts])
    assert np.array_equal(located, rows(case.order().locate(slots)))
    for part in parts:
        sections = order.sections(part)
        dataset = order.locate_places(step, part).dataset
        assert [len(own) for own, _ in sections] == np.bincount(dataset, minlength=len(sections)).tolist()
        for number, (own, fraction) in enumerate(sections):
            assert 0 <= fraction <= 1
            alone = order.parts[number].locate_places(step, own)
            mixed = order.locate_places(step, part)
            assert np.array_equal(alone.shard, mixed.shard[mixed.dataset == number])


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=10).filter(sum), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_mix_of_one_is_the_data_set_itself(sizes: list[int], seed: int) -> None:
    cfg, slots = OrderConfig(seed=seed, streams=4), np.arange(500)
    mixed, alone = MixedOrder([sizes], [7], cfg, 12).locate(slots), SampleOrder(sizes, cfg, 12).locate(slots)
    assert np.array_equal(rows(mixed)[:, 1:], np.stack(alone, axis=-1))
    assert not mixed.dataset.any()


def test_a_far_slot_is_located_directly() -> None:
    order = MixedOrder([[10_000] * 20_000, [4096] * 250_000, [7]], [5, 2, 1], OrderConfig(), 4096)
    located = order.locate(np.arange(10**14, 10**14 + 4096))
    assert np.all(located.shard >= 0)
    assert np.bincount(located.dataset).tolist() == [2560, 1024, 512]


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shared as 2:1: make data\.global_batch a multiple of 3"):
        MixedOrder([[5], [5]], [4, 2], OrderConfig(streams=1), 8)
    with pytest.raises(ValueError, match="not a multiple of 64 streams"):
        MixedOrder([[5], [5]], [1, 1], OrderConfig(), 32)
    for sizes, weights in (([], []), ([[5]], [1, 1]), ([[5], [5]], [1, 0])):
        with pytest.raises(ValueError, match="weight of 1 or more"):
            MixedOrder(sizes, weights, OrderConfig(streams=1), 8)
    with pytest.raises(ValueError, match="weight is 0: set it to"):
        MixPart(uri="a", weight=0)
    with pytest.raises(ValueError, match="start at 0"):
        MixedOrder([[5]], [1], OrderConfig(streams=1), 8).locate(np.array([-1]))


def test_the_digest_names_what_is_mixed_and_how() -> None:
    assert mix_digest(["a"], [3]) == "a"
    assert mix_digest(["a", "b"], [1, 2]) == mix_digest(["a", "b"], [10, 20])
    known = {mix_digest(*mix) for mix in ((["a", "b"], [1, 2]), (["b", "a"], [1, 2]), (["a", "b"], [2, 1]))}
    assert len(known) == 3


def test_equal_ids_of_two_data_sets_stay_apart() -> None:
    ids = np.array([sample_id(f"s/{k}") for k in range(1000)])
    every = np.concatenate([keyed_ids(ids, np.full(1000, number)) for number in range(4)])
    assert np.array_equal(every[:1000], ids)
    assert np.unique(every).size == 4000
    assert every.min() >= 0


SIZES = ((11, 3, 20), (5, 4))


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> list[MixPart]:
    """A tar and an arrow data set that hold the same ids."""
    parts = []
    for number, (sizes, weight) in enumerate(zip(SIZES, (6, 2), strict=True)):
        uri = str(tmp_path_factory.mktemp(f"set{number}"))
        write_dataset(uri, sizes, ("tar", "arrow")[number])
        parts.append(MixPart(uri=uri, weight=weight))
    return parts


def loader(mix: list[MixPart], rank: int = 0, world: int = 1, workers: int = 0, batch: int = 8) -> Loader:
    cfg = LoaderConfig(workers=workers)
    return Loader(mix, OrderConfig(seed=5, streams=4), AugmentConfig(image_size=16), cfg, batch, rank, world)


def test_batches_hold_the_mix_at_any_world_size(mix: list[MixPart]) -> None:
    order = MixedOrder(SIZES, [3, 1], OrderConfig(seed=5, streams=4), 8)
    for world, workers in ((1, 0), (3, 0), (1, 2)):
        ranks = [list(loader(mix, rank, world, workers).batches(5, 11)) for rank in range(world)]
        real = [batch for rank in ranks for batch in rank]
        whole = {name: torch.cat([b[name][b["weight"] > 0] for b in real]) for name in real[0]}
        assert sorted(whole["slot"].tolist()) == list(range(40, 88))
        located = order.locate(whole["slot"].numpy())
        first = [np.cumsum([0, *sizes]) for sizes in SIZES]
        numbers = [
            first[d][s] + i for d, s, i in zip(located.dataset, located.shard, located.index, strict=True)
        ]
        ids = np.array([sample_id(f"small/{number:05d}") for number in numbers])
        assert whole["id"].tolist() == keyed_ids(ids, located.dataset).tolist()
        assert whole["epoch"].tolist() == located.epoch.tolist()


def test_the_loader_knows_the_mix_by_one_digest(mix: list[MixPart]) -> None:
    made = loader(mix)
    assert made.num_samples == sum(map(sum, SIZES))
    assert made.manifest_digest == mix_digest([load_dataset(part.uri).digest for part in mix], [3, 1])
    alone = Loader(mix[0].uri, OrderConfig(streams=4), AugmentConfig(image_size=16), LoaderConfig(), 8, 0, 1)
    assert alone.manifest_digest == sha256_file(Path(mix[0].uri, "manifest.json"))
    with pytest.raises(ValueError, match="multiple of 4"):
        loader(mix, batch=12 + 8 + 2)


def test_a_recipe_names_one_data_set_or_a_mix() -> None:
    mixed = load_train_recipe(EMOJI, ["data.uri=''", "data.mix=[{uri: a, weight: 3}, {uri: b, weight: 1}]"])
    assert mixed.data.parts == (MixPart(uri="a", weight=3), MixPart(uri="b", weight=1))
    assert DataConfig(uri="x").parts == (MixPart(uri="x", weight=1),)
    with pytest.raises(ConfigError, match=r"data\.uri and data\.mix are both set"):
        load_train_recipe(EMOJI, ["data.mix=[{uri: a, weight: 3}]", "data.uri=x"])
    with pytest.raises(ConfigError, match=r"set data\.uri or data\.mix"):
        load_train_recipe(EMOJI, ["data.uri=''"])
    with pytest.raises(ConfigError, match=r"data\.mix\.0.*weight is 0"):
        load_train_recipe(EMOJI, ["data.uri=''", "data.mix=[{uri: a, weight: 0}]"])
