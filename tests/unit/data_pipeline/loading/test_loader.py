"""Laws of the loader: batches depend on the step alone, not on ranks, workers or resumes; errors and stops
are clean."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import DataError, ManifestMismatch, ShardCorrupt
from cluster.store import open_store
from data_pipeline.catalog import load_dataset
from data_pipeline.image.augment import AugmentConfig, train_view
from data_pipeline.loading.loader import BadSample, Batch, Loader, LoaderConfig
from data_pipeline.loading.mixing import MixPart
from data_pipeline.loading.order import OrderConfig, SampleOrder, window_of
from data_pipeline.loading.tokenizer import Tokenizer
from data_pipeline.records import sample_id
from data_pipeline.upkeep import takedown
from tests.support.small_dataset import flip_byte, picture, write_dataset
from tests.support.stored_batches import eval_batches

SIZES = (11, 3, 20, 7)
FIRST = np.cumsum([0, *SIZES])
ORDER = OrderConfig(seed=5, streams=4, window_shards=2)
AUGMENT = AugmentConfig(image_size=16)
BATCH = 8


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("set"))
    write_dataset(folder, SIZES)
    return folder


def loader(
    uri: str, rank: int = 0, world: int = 1, batch: int = BATCH, cache: str | None = None, workers: int = 0
):
    cfg = LoaderConfig(workers=workers, cache=cache, cache_bytes=10**9)
    return Loader(uri, ORDER, AUGMENT, cfg, batch, rank, world)


def joined(uri: str, world: int, steps: range, batch: int = BATCH) -> Batch:
    """What all ranks get, in slot order, without the slots that only fill up."""
    ranks = [list(loader(uri, rank, world, batch).batches(steps.start, steps.stop)) for rank in range(world)]
    parts = [part for rank in ranks for part in rank]
    whole = {name: torch.cat([part[name][part["weight"] > 0] for part in parts]) for name in parts[0]}
    in_order = whole["slot"].argsort()
    return {name: tensor[in_order] for name, tensor in whole.items()}


def assert_equal(left: Batch, right: Batch) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def test_a_batch_holds_what_the_order_says(uri: str) -> None:
    order = SampleOrder(SIZES, ORDER, BATCH)
    tokenizer = Tokenizer()
    for step, batch in zip(range(4, 7), loader(uri).batches(4, 7), strict=True):
        slots = batch["slot"].numpy()
        assert sorted(slots) == list(range(step * BATCH, (step + 1) * BATCH))
        epoch, shard, index = order.locate(slots)
        numbers = FIRST[shard] + index
        ids = [sample_id(f"small/{number:05d}") for number in numbers]
        assert batch["epoch"].tolist() == epoch.tolist()
        assert batch["id"].tolist() == ids
        assert batch["weight"].tolist() == [1.0] * BATCH
        tokens = tokenizer.encode([f"picture number {number}" for number in numbers])
        assert batch["tokens"].tolist() == tokens.tolist()
        for view, number, i, e in zip(batch["image"], numbers, ids, epoch, strict=True):
            expected = train_view(picture(number), i, int(e), ORDER.seed, AUGMENT)
            assert np.array_equal(view.permute(1, 2, 0).numpy(), expected)
    assert batch["image"].shape == (BATCH, 3, 16, 16)
    assert {name: t.dtype for name, t in batch.items()} == {
        "image": torch.uint8,
        "tokens": torch.int64,
        "id": torch.int64,
        "epoch": torch.int64,
        "slot": torch.int64,
        "weight": torch.float32,
    }


@pytest.mark.parametrize("world", [2, 3, 5, 8, 9])
def test_any_world_size_gives_the_same_samples_and_views(uri: str, world: int) -> None:
    steps = range(3, 9)  # crosses an epoch: 41 samples, batches of 8
    whole = joined(uri, 1, steps)
    assert_equal(joined(uri, world, steps), whole)
    assert whole["slot"].tolist() == list(range(3 * BATCH, 9 * BATCH))


def test_every_rank_gets_as_many_slots_and_fillers_weigh_nothing(uri: str) -> None:
    for world, part, weights in [(3, 3, [[1, 1, 1], [1, 1, 1], [1, 1, 0]]), (5, 2, [[1, 1]] * 4 + [[0, 0]])]:
        for rank in range(world):
            (batch,) = loader(uri, rank, world).batches(2, 3)
            assert len(batch["id"]) == part
            assert batch["weight"].tolist() == weights[rank]
            # They repeat a sample of this batch, so nothing strange reaches the model.
            assert torch.all(batch["slot"][batch["weight"] == 0] // BATCH == 2)


def test_a_resume_is_the_tail_of_the_uninterrupted_run(uri: str) -> None:
    whole = list(loader(uri).batches(0, 12))
    for step in (1, 5, 11):
        tail = list(loader(uri).batches(step, 12))
        assert len(tail) == 12 - step
        for left, right in zip(tail, whole[step:], strict=True):
            assert_equal(left, right)
    assert list(loader(uri).batches(12, 12)) == []


def test_a_far_step_starts_at_once(uri: str) -> None:
    far = 10**11
    (batch,) = loader(uri).batches(far, far + 1)
    assert batch["slot"].min() == far * BATCH
    assert batch["epoch"].max() - far * BATCH // sum(SIZES) in (0, 1)


def test_world_8_6_3_8_with_0_to_4_workers_is_the_uninterrupted_run(uri: str) -> None:
    """The (slot, id) pairs over cuts, world sizes and numbers of workers are those of one long run, each
    once."""
    batch, whole = 24, joined(uri, 1, range(0, 60), 24)
    seen: dict[int, int] = {}
    cuts = [(0, 13, 8, 0), (13, 14, 6, 0), (14, 31, 3, 2), (31, 44, 8, 0), (44, 60, 1, 4)]
    for first, last, world, workers in cuts:
        for rank in range(world):
            for part in loader(uri, rank, world, batch, workers=workers).batches(first, last):
                real = part["weight"] > 0
                for slot, number in zip(part["slot"][real].tolist(), part["id"][real].tolist(), strict=True):
                    assert slot not in seen
                    seen[slot] = number
    assert [seen[slot] for slot in range(60 * batch)] == whole["id"].tolist()


def test_both_formats_give_the_same_batches(uri: str, tmp_path: Path) -> None:
    write_dataset(str(tmp_path), SIZES, "arrow")
    for left, right in zip(loader(str(tmp_path)).batches(2, 9), loader(uri).batches(2, 9), strict=True):
        assert_equal(left, right)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_removed_sample_is_gone_and_the_others_stay_where_they_are(tmp_path: Path, workers: int) -> None:
    uri = str(tmp_path)
    write_dataset(uri, SIZES)
    before = joined(uri, 1, range(0, 11))
    gone = [3, 11, 12, 40]
    remove_from(uri, gone)
    ids = {sample_id(f"small/{number:05d}") for number in gone}
    empty = Tokenizer().encode([""])[0].tolist()
    found = 0
    for step, batch in enumerate(loader(uri, workers=workers).batches(0, 11)):
        for place, (slot, number) in enumerate(
            zip(batch["slot"].tolist(), batch["id"].tolist(), strict=True)
        ):
            assert slot // BATCH == step
            assert number == before["id"][slot]  # the order and the ids are those of before
            if number in ids:
                found += 1
                assert batch["weight"][place] == 0
                assert not batch["image"][place].any()
                assert batch["tokens"][place].tolist() == empty
            else:
                assert batch["weight"][place] == 1
                assert torch.equal(batch["image"][place], before["image"][slot])
                assert torch.equal(batch["tokens"][place], before["tokens"][slot])
    assert found >= 2 * len(gone)  # 88 slots are two epochs of 41


def test_a_removal_during_the_run_is_honoured(tmp_path: Path) -> None:
    uri = str(tmp_path)
    write_dataset(uri, SIZES)
    cfg = LoaderConfig(tombstone_seconds=0)
    batches = Loader(uri, ORDER, AUGMENT, cfg, BATCH, 0, 1).batches(0, 11)
    assert all(next(batches)["weight"].tolist() == [1.0] * BATCH for _ in range(5))
    remove_from(uri, list(range(sum(SIZES))))
    for batch in batches:
        assert not batch["weight"].any()
        assert not batch["image"].any()
    for batch in eval_batches(uri, 16, 12):
        assert not batch["weight"].any()
        assert not batch["image"].any()


def remove_from(uri: str, numbers: list[int]) -> None:
    """Leave a tombstone for these samples, as `maskclip dataset remove` writes it."""
    document = {
        "by": "id",
        "values": [str(number) for number in numbers],
        "reason": "asked for",
        "ids": sorted(sample_id(f"small/{number:05d}") for number in numbers),
        "dataset": load_dataset(uri).digest,
    }
    takedown._write(open_store(uri), document, "2026-01-01T00:00:00Z")


def test_remote_shards_and_two_workers_change_nothing(uri: str, s3_env: str, tmp_path: Path) -> None:
    write_dataset(s3_env, SIZES)
    remote = loader(s3_env, rank=1, world=3, cache=str(tmp_path), workers=2)
    local = loader(uri, rank=1, world=3)
    assert remote.manifest_digest == local.manifest_digest
    assert remote.num_samples == sum(SIZES)
    state = torch.random.get_rng_state()
    for left, right in zip(remote.batches(2, 9), local.batches(2, 9), strict=True):
        assert_equal(left, right)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture
def signals_at_birth() -> Iterator[None]:
    """Sends SIGINT and SIGTERM to every worker as soon as there is one, and again a little later."""
    done = threading.Event()

    def send() -> None:
        sent: dict[int, int] = {}
        while not done.is_set():
            for pid in children():
                if sent.get(pid, 0) < 200:
                    sent[pid] = sent.get(pid, 0) + 1
                    for number in (signal.SIGINT, signal.SIGTERM):
                        os.kill(pid, number)
            time.sleep(0.01)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.usefixtures("signals_at_birth")
def test_workers_outlive_stop_signals_and_end_when_closed(uri: str) -> None:
    before = children()
    batches = loader(uri, workers=1).batches(0, 1000)
    for left, right in zip(batches, loader(uri).batches(0, 5), strict=False):
        assert_equal(left, right)
    assert len(children() - before) == 1
    batches.close()
    assert children() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_sample_is_one_clean_error(tmp_path: Path, workers: int) -> None:
    write_dataset(str(tmp_path), SIZES)
    tar = tmp_path / "shard-000001.tar"
    flip_byte(tar, 512 + 200)  # in the image of its first sample, 00011
    before = children()
    with pytest.raises(ShardCorrupt, match=r"shard-000001\.tar: the image of sample '00011'") as caught:
        list(loader(str(tmp_path), workers=workers).batches(0, 6))
    assert "\n" not in str(caught.value)
    assert children() == before


def test_a_data_set_replaced_under_a_run_is_noticed(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), SIZES)
    running = loader(str(tmp_path), workers=1)
    open_store(str(tmp_path)).delete("manifest.json")
    write_dataset(str(tmp_path), SIZES[::-1])
    with pytest.raises(ManifestMismatch, match="replaced"):
        next(running.batches(0, 1))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.small_dataset.picture", lambda *_: b"\xff\xd8 no jpeg")
    write_dataset(str(tmp_path), [4])
    with pytest.raises(DataError, match=r"the stored image of sample '\d+' \(id \d+\) cannot be decoded"):
        next(loader(str(tmp_path), batch=4).batches(0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_one_undecodable_sample_has_weight_0_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(
        "tests.support.small_dataset.picture", lambda n, *_: b"\xff\xd8 no jpeg" if n == 7 else picture(n)
    )
    write_dataset(str(tmp_path), SIZES)
    told: list[BadSample] = []
    batches = list(loader(str(tmp_path), workers=workers).batches(0, 6, report=told.append))
    (bad,) = told
    assert bad.key == "00007"
    (batch,) = (batch for batch in batches if (batch["slot"] == bad.slot).any())
    (at,) = torch.nonzero(batch["slot"] == bad.slot)[0].tolist()
    assert (batch["weight"][at], batch["id"][at], batch["image"][at].max()) == (0, bad.id, 0)
    assert sum(int((batch["weight"] == 0).sum()) for batch in batches) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_steps_go_around_skipped_windows(uri: str, workers: int) -> None:
    skipped = (2, 3, 6)
    windows = [0, 1, 4, 5, 7, 8]
    assert [window_of(step, skipped) for step in range(6)] == windows
    whole = list(loader(uri).batches(0, 9))
    rest = list(loader(uri, 1, 2, workers=workers).batches(1, 6, skipped))
    for window, batch in zip(windows[1:], rest, strict=True):
        here = torch.isin(whole[window]["slot"], batch["slot"])
        assert_equal(batch, {name: tensor[here] for name, tensor in whole[window].items()})


def test_what_goes_to_a_worker_is_small(uri: str) -> None:
    assert len(pickle.dumps(loader(uri, workers=1)._spec)) < 1000


def test_evaluation_reads_everything_in_stored_order(uri: str, s3_env: str) -> None:
    batches = list(eval_batches(uri, 16, 12))
    assert [len(batch["id"]) for batch in batches] == [12, 12, 12, 5]
    assert torch.cat([batch["slot"] for batch in batches]).tolist() == list(range(41))
    assert torch.cat([batch["id"] for batch in batches]).tolist() == [
        sample_id(f"small/{number:05d}") for number in range(41)
    ]
    assert all(torch.all(batch["weight"] == 1) for batch in batches)
    write_dataset(s3_env, SIZES)
    for left, right in zip(eval_batches(s3_env, 16, 12), batches, strict=True):
        assert_equal(left, right)


def test_settings_that_make_no_sense_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="not a multiple of 4 streams"):
        loader(uri, batch=10)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        loader(uri, rank=2, world=2)
    for workers in (-1, 100_000):
        with pytest.raises(ValueError, match=f"workers is {workers}: set data.loader.workers to"):
            LoaderConfig(workers=workers)
    for name in ("prefetch", "cache_bytes", "lookahead", "transfers"):
        with pytest.raises(ValueError, match=f"{name} is 0: set data.loader.{name} to"):
            replace(LoaderConfig(), **{name: 0})
    for seconds in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"set data\.loader\.tombstone_seconds to"):
            LoaderConfig(tombstone_seconds=seconds)


def test_nothing_is_left_to_train_on(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    write_dataset(a, SIZES)
    write_dataset(b, SIZES, first=100)
    remove_from(a, list(range(1, sum(SIZES))))
    loader(a)
    remove_from(a, [0])
    with pytest.raises(DataError, match=f"{a}: every sample was removed"):
        loader(a)
    mixed = [MixPart(uri=a, weight=1), MixPart(uri=b, weight=1)]
    Loader(mixed, ORDER, AUGMENT, LoaderConfig(workers=0), BATCH, 0, 1)
