"""The preprocess job over real Ray: the same bytes whatever happens, nothing lost, nothing half committed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import ConfigError, DataError, ManifestMismatch, ShardCorrupt
from cluster.ray_tasks import ray_session
from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import load_dataset, load_index, verify_dataset
from data_pipeline.image.transforms import TransformConfig
from data_pipeline.ingest.sources import SourceConfig
from data_pipeline.job import ledger
from data_pipeline.job.dedup import DuplicateConfig
from data_pipeline.job.filters import FilterConfig
from data_pipeline.job.lists import ListConfig
from data_pipeline.job.preprocess import PreprocessConfig, PreprocessSummary, run_preprocess
from data_pipeline.job.selection import ShardConfig
from tests.support.paths import ROOT
from tests.support.raw_input import encode, members, noise, write_tar

CHUNKS = 6
# A driver of its own, which kills itself at some point: python -c DRIVER <source> <output> [<stage> <done>]
DRIVER = """
import os, signal, sys
from data_pipeline.job.preprocess import PreprocessConfig, run_preprocess
from data_pipeline.job.selection import ShardConfig
from data_pipeline.ingest.sources import SourceConfig
from data_pipeline.image.transforms import TransformConfig
config = PreprocessConfig(
    source=SourceConfig(uri=sys.argv[1]), output=sys.argv[2], transform=TransformConfig(short_side=48),
    shards=ShardConfig(samples_per_shard=10, shuffle="global"), window=2, workers=1,
)
def progress(state):
    if sys.argv[3:] == [state["stage"], str(state["done"])]:
        os.kill(os.getpid(), signal.SIGKILL)
run_preprocess(config, progress)
"""


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(2):
        yield


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of 8 good samples each, bad rows among them, and one tar of nothing but bad rows."""
    folder = tmp_path_factory.mktemp("raw")
    huge = encode(Image.new("1", (14_000, 14_000)), "PNG")
    for index in range(CHUNKS):
        files = [file for i in range(8) for file in members(f"{index:05d}{i:04d}", index * 8 + i)]
        if index == 1:
            files += [("broken.jpg", b"no image"), ("broken.txt", b"x"), ("bare.jpg", encode(noise(9, 9)))]
        if index in (1, 3):
            files += [("huge.png", huge), ("huge.txt", b"14000 x 14000")]
        if index == 4:
            files = [("a.txt", b"a"), ("b.txt", b"b")]
        write_tar(folder / f"{index:05d}.tar", files)
    return folder


def config(raw: Path | str, to: Path | str, **changes: Any) -> PreprocessConfig:
    base = PreprocessConfig(
        source=SourceConfig(uri=str(raw)),
        output=str(to),
        transform=TransformConfig(short_side=48),
        shards=ShardConfig(samples_per_shard=10, shuffle="global"),
    )
    return replace(base, **changes)


def digests(store: ObjectStore) -> dict[str, str]:
    """sha256 of every object under the output, the manifest included."""
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key, _ in store.list()}


def fates(output: Path) -> list[dict[str, Any]]:
    """The rows of all chunks, in source order."""
    return [row for path in sorted(output.glob("rows/*")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def done(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreprocessSummary]:
    output = tmp_path_factory.mktemp("done") / "set"
    return output, run_preprocess(config(raw, output, window=1))


def test_every_row_is_kept_or_dropped(done: tuple[Path, PreprocessSummary]) -> None:
    output, summary = done
    dataset = load_dataset(str(output))
    assert summary.samples == dataset.num_samples == 8 * (CHUNKS - 1)
    assert summary.shards == len(dataset.shards) >= 3
    assert summary.rejects == {"no_caption": 1, "no_image": 2, "too_many_pixels": 2, "not_an_image": 1}
    assert dataset.counts["rows_in"] == dataset.counts["kept"] + dataset.counts["dropped"] == 46
    assert (summary.skipped, summary.already_committed) == (0, False)
    rows = fates(output)
    assert len(rows) == 46
    assert [(row["source"], row["reason"]) for row in rows if row["fate"] == "dropped"] == [
        ("00001.tar/broken", "not_an_image"),
        ("00001.tar/bare", "no_caption"),
        ("00001.tar/huge", "too_many_pixels"),
        ("00003.tar/huge", "too_many_pixels"),
        ("00004.tar/a", "no_image"),
        ("00004.tar/b", "no_image"),
    ]
    assert verify_dataset(str(output)) == []


def test_a_row_says_where_its_sample_stands(done: tuple[Path, PreprocessSummary]) -> None:
    store, dataset = open_store(str(done[0])), load_dataset(str(done[0]))
    places = {}
    for shard in dataset.shards:
        number = int(shard.name.removeprefix("shard-").partition(".")[0])
        for index, row in enumerate(load_index(store, shard).to_pylist()):
            places[row["id"]] = (number, index, row["source"], row["sha256"])
    kept = [row for row in fates(done[0]) if row["fate"] == "kept"]
    assert places == {row["id"]: (row["shard"], row["index"], row["source"], row["sha256"]) for row in kept}


def test_only_the_data_set_is_left(done: tuple[Path, PreprocessSummary]) -> None:
    names = {str(path.relative_to(done[0])) for path in done[0].rglob("*") if path.is_file()}
    assert names == {"manifest.json", *load_dataset(str(done[0])).files}


def test_the_bytes_do_not_depend_on_the_number_of_workers_or_the_place(
    done: tuple[Path, PreprocessSummary], raw: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(raw)
    summary = run_preprocess(config(moved, tmp_path / "set", window=5))
    assert summary.manifest_digest == done[1].manifest_digest
    assert digests(open_store(str(tmp_path / "set"))) == digests(open_store(str(done[0])))


def test_progress_says_what_is_done(raw: Path, tmp_path: Path) -> None:
    states: list[dict[str, Any]] = []
    summary = run_preprocess(config(raw, tmp_path / "set"), lambda state: states.append(dict(state)))
    stages = list(dict.fromkeys(state["stage"] for state in states))
    assert stages == ["stage", "select", "write", "commit"]
    staging = [state for state in states if state["stage"] == "stage"]
    assert [(state["done"], state["total"]) for state in staging] == [(i, CHUNKS) for i in range(CHUNKS + 1)]
    assert staging[0]["rows"] == 0
    assert staging[0]["seconds_left"] is None
    assert (staging[-1]["rows"], staging[-1]["kept"], staging[-1]["dropped"]) == (46, 40, 6)
    assert staging[-1]["seconds_left"] == 0
    assert staging[-1]["rows_per_second"] > 0
    for stage in stages[1:]:
        last = [state for state in states if state["stage"] == stage][-1]
        assert last["done"] == last["total"]
        assert (last["rows"], last["kept"], last["dropped"], last["skipped"]) == (46, 40, 6, 0)
    assert [state for state in states if state["stage"] == "write"][-1]["total"] == summary.shards


@pytest.mark.parametrize(
    ("stage", "at", "skipped"), [("stage", 2, 2), ("select", 0, 6), ("write", 1, 7), ("commit", 0, 10)]
)
def test_a_killed_job_is_continued_to_the_same_bytes(
    done: tuple[Path, PreprocessSummary], raw: Path, tmp_path: Path, stage: str, at: int, skipped: int
) -> None:
    output = tmp_path / "set"
    child = subprocess.run([sys.executable, "-c", DRIVER, str(raw), str(output), stage, str(at)], cwd=ROOT)
    assert child.returncode == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    assert run_preprocess(config(raw, output)).skipped >= skipped
    assert digests(open_store(str(output))) == digests(open_store(str(done[0])))


def test_an_object_store_gets_the_same_bytes(
    done: tuple[Path, PreprocessSummary], raw: Path, s3_env: str
) -> None:
    source = open_store(f"{s3_env}/raw")
    for path in sorted(raw.glob("*.tar")):
        source.put_file(path.name, path)
    output = f"{s3_env}/sets/one"
    subprocess.run(
        [sys.executable, "-c", DRIVER, source.uri, output], cwd=ROOT, env=dict(os.environ), check=True
    )
    assert load_dataset(output).digest == done[1].manifest_digest
    assert digests(open_store(output)) == digests(open_store(str(done[0])))


def stop_at(raw: Path, output: Path, stage: str, **changes: Any) -> None:
    """Run the job up to the beginning of a stage."""

    def progress(state: dict[str, Any]) -> None:
        if state["stage"] == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_preprocess(config(raw, output, **changes), progress)


def test_a_rerun_does_what_is_missing_and_no_more(
    done: tuple[Path, PreprocessSummary], raw: Path, tmp_path: Path
) -> None:
    stop_at(raw, tmp_path, "commit")
    first, second, third = sorted(tmp_path.glob("shard-*.tar"))[:3]
    first.unlink()
    with second.with_suffix(".arrow").open("ab") as file:
        file.write(b"x")
    untouched = third.stat().st_mtime_ns
    staged = {path: path.stat().st_mtime_ns for path in tmp_path.glob("staging/chunk-*")}
    states: list[dict[str, Any]] = []

    def progress(state: dict[str, Any]) -> None:
        states.append(state)
        if (state["stage"], state["done"]) == ("commit", 0):
            assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("staging/chunk-*")} == staged

    run_preprocess(config(raw, tmp_path), progress)
    write = [state for state in states if state["stage"] == "write"]
    assert write[-1]["skipped"] == write[-1]["total"] - 2
    assert digests(open_store(str(tmp_path))) == digests(open_store(str(done[0])))
    assert third.stat().st_mtime_ns == untouched


def test_staged_images_that_are_gone_are_made_again(
    done: tuple[Path, PreprocessSummary], raw: Path, tmp_path: Path
) -> None:
    """Their rows have other offsets in other objects, so everything after them is done again too."""
    stop_at(raw, tmp_path, "commit")
    next(tmp_path.glob("staging/chunk-000002*")).unlink()
    assert run_preprocess(config(raw, tmp_path)).skipped == CHUNKS - 1
    assert digests(open_store(str(tmp_path))) == digests(open_store(str(done[0])))


def test_a_committed_set_is_left_alone(
    done: tuple[Path, PreprocessSummary], raw: Path, tmp_path: Path
) -> None:
    output, first = done
    files = [path for path in output.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = run_preprocess(config(raw, output))
    assert again.already_committed
    assert replace(again, already_committed=False, skipped=0, seconds=first.seconds) == first
    with pytest.raises(ManifestMismatch, match="by another recipe"):
        run_preprocess(config(raw, output, transform=TransformConfig(short_side=40)))
    write_tar(tmp_path / "other.tar", members("a", 0))
    with pytest.raises(ManifestMismatch, match="from other input"):
        run_preprocess(config(tmp_path, output))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


def test_what_a_killed_commit_left_is_cleaned(raw: Path, tmp_path: Path) -> None:
    stop_at(raw, tmp_path, "commit")
    store = open_store(str(tmp_path))
    store.put("shard-000099.tar", b"of an attempt before the input changed")
    (tmp_path / "staging" / ".tmp-0123").write_bytes(b"of a worker that was killed")
    run_preprocess(config(raw, tmp_path))
    store.put("staging/late", b"of a worker that died last")
    store.put("ledger/late", b"{}")
    assert run_preprocess(config(raw, tmp_path)).already_committed
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"manifest.json", *load_dataset(str(tmp_path)).files}


def test_a_broken_tar_commits_nothing_and_costs_only_itself(tmp_path: Path) -> None:
    raw, output = tmp_path / "raw", tmp_path / "set"
    for index in range(3):
        write_tar(raw / f"{index}.tar", members(f"{index}", index))
    whole = (raw / "2.tar").read_bytes()
    (raw / "2.tar").write_bytes(whole[:3000])
    with pytest.raises(ShardCorrupt, match=r"2\.tar: .*byte"):
        run_preprocess(config(raw, output, window=1))
    assert not (output / "manifest.json").exists()
    (raw / "2.tar").write_bytes(whole)
    summary = run_preprocess(config(raw, output))
    assert (summary.samples, summary.skipped) == (3, 2)


def test_a_changed_input_is_read_again(tmp_path: Path) -> None:
    raw, output = tmp_path / "raw", tmp_path / "set"
    write_tar(raw / "0.tar", members("a", 0))
    write_tar(raw / "1.tar", [("b.txt", b"no image")])
    stop_at(raw, output, "commit")
    write_tar(raw / "1.tar", members("b", 1) + members("c", 2) + members("d", 3))
    assert run_preprocess(config(raw, output)).samples == 4
    assert verify_dataset(str(output)) == []
    fresh = run_preprocess(config(raw, tmp_path / "fresh"))
    assert load_dataset(str(output)).digest == fresh.manifest_digest


def test_another_recipe_does_not_mix_into_unfinished_work(raw: Path, tmp_path: Path) -> None:
    ledger.claim(open_store(str(tmp_path)), {"transform": "of somebody else"})
    with pytest.raises(ManifestMismatch, match="unfinished work of another recipe"):
        run_preprocess(config(raw, tmp_path))


def test_shards_of_somebody_else_are_left_alone(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(ManifestMismatch, match="not made here"):
        run_preprocess(config(raw, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"precious"


def test_nothing_usable_is_an_error_and_commits_nothing(tmp_path: Path) -> None:
    raw, output = tmp_path / "raw", tmp_path / "set"
    with pytest.raises(DataError, match=r"no \*\.tar"):
        run_preprocess(config(raw, output))
    assert not output.exists()
    write_tar(raw / "0.tar", [("a.txt", b"no image"), ("b.jpg", b"x"), ("b.txt", b"no image either")])
    with pytest.raises(DataError, match=r"empty, .*\(no_image 1, not_an_image 1\)"):
        run_preprocess(config(raw, output))
    assert not (output / "manifest.json").exists()


def test_duplicates_are_dropped_over_all_tars(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for tar in range(3):
        files = members(f"{tar}a", tar) + members(f"{tar}same", 99)
        write_tar(raw / f"{tar}.tar", files)
    off = run_preprocess(config(raw, tmp_path / "all"))
    on = run_preprocess(config(raw, tmp_path / "set", duplicates=DuplicateConfig(bytes=True)))
    assert (off.samples, off.rejects) == (6, {})
    assert (on.samples, on.rejects) == (4, {"duplicate_bytes": 2})
    assert verify_dataset(str(tmp_path / "set")) == []


@pytest.mark.parametrize("format", ["tar", "arrow"])
def test_without_a_shuffle_the_samples_stand_in_source_order(raw: Path, tmp_path: Path, format: Any) -> None:
    shards = ShardConfig(shuffle="none", format=format)
    run_preprocess(config(raw, tmp_path, shards=shards))
    store, dataset = open_store(str(tmp_path)), load_dataset(str(tmp_path))
    sources = [row["source"] for shard in dataset.shards for row in load_index(store, shard).to_pylist()]
    assert sources == [row["source"] for row in fates(tmp_path) if row["fate"] == "kept"]
    assert [(shard.name.endswith(format), shard.num_samples) for shard in dataset.shards] == [(True, 8)] * 5
    assert verify_dataset(str(tmp_path)) == []


def test_the_recipe_has_the_lists_and_no_address(raw: Path, tmp_path: Path) -> None:
    """The same list elsewhere is the same recipe; another entry makes another one."""
    for name, entry in (("a", "000000001"), ("b", "000000001"), ("c", "000000002")):
        (tmp_path / f"{name}.txt").write_text(f"{entry}\n")

    def deny(name: str) -> FilterConfig:
        return FilterConfig(deny=ListConfig(keys=(str(tmp_path / f"{name}.txt"),)))

    first = run_preprocess(config(raw, tmp_path / "set", filters=deny("a")))
    assert first.rejects["denied"] == 1
    assert run_preprocess(config(raw, tmp_path / "set", filters=deny("b"))).already_committed
    with pytest.raises(ManifestMismatch, match="by another recipe"):
        run_preprocess(config(raw, tmp_path / "set", filters=deny("c")))
    assert str(tmp_path) not in (tmp_path / "set" / "manifest.json").read_text()


def test_the_output_must_not_lie_in_the_input(raw: Path) -> None:
    for output in (raw, raw / "set", raw.parent):
        with pytest.raises(ConfigError, match=r"(inside the source|inside the output)"):
            run_preprocess(config(raw, output))


@pytest.mark.parametrize(
    "wrong",
    [
        {"output": ""},
        {"window": 0},
        {"retries": -1},
        {"retry_rounds": -1},
        {"accept_retriable": 1.5},
        {"workers": 0},
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"set {next(iter(wrong))} to"):
        config("in", "out", **wrong)
