"""Two drivers of one output in a bad order: a committed file never changes, and each says why it ends."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ManifestMismatch, StorageUnavailable, Superseded
from cluster.ray_tasks import ray_session
from cluster.scratch import scratch_folder
from cluster.store import open_store
from data_pipeline.catalog import load_dataset, verify_dataset
from data_pipeline.image.transforms import TransformConfig
from data_pipeline.ingest.sources import SourceConfig
from data_pipeline.job import preprocess, write_stage
from data_pipeline.job.preprocess import PreprocessConfig, PreprocessSummary, run_preprocess
from data_pipeline.job.selection import ShardConfig
from tests.support.raw_input import members, write_tar

MOMENTS = [("stage", 0), ("stage", 1), ("select", 0), ("write", 0), ("write", 1), ("commit", 0)]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(2):
        yield


@pytest.fixture
def recipe(tmp_path: Path) -> PreprocessConfig:
    change_input(tmp_path, 0)
    return PreprocessConfig(
        source=SourceConfig(uri=str(tmp_path / "raw")),
        output=str(tmp_path / "set"),
        transform=TransformConfig(short_side=48),
        shards=ShardConfig(samples_per_shard=3, shuffle="global"),
        window=1,
    )


def change_input(folder: Path, version: int) -> None:
    """Two tars; in those of another version some images are others, and the sizes of the tars too."""
    for tar in range(2):
        seeds = [tar * 4 + i + 100 * version * (i % 2) for i in range(4)]
        parts = [file for i, seed in enumerate(seeds) for file in members(f"{tar}{i}", seed)]
        write_tar(folder / "raw" / f"{tar}.tar", [*parts, ("n.txt", b"x" * 30_000 * version)])


def files(recipe: PreprocessConfig) -> dict[str, str]:
    store = open_store(recipe.output)
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key, _ in store.list()}


def once(moment: tuple[str, int], do: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """A report that does something the first time that the job is at the moment."""
    todo = [do]

    def progress(state: dict[str, Any]) -> None:
        if (state["stage"], state["done"]) == moment and todo:
            todo.pop()()

    return progress


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_slow_driver_never_changes_what_another_committed(
    recipe: PreprocessConfig, tmp_path: Path, moment: tuple[str, int]
) -> None:
    """It is stopped, the input changes, another driver does the whole job, and it goes on."""
    committed: dict[str, str] = {}

    def other() -> None:
        change_input(tmp_path, 1)
        run_preprocess(recipe)
        committed.update(files(recipe))

    with pytest.raises(ManifestMismatch, match="from other input"):
        run_preprocess(recipe, once(moment, other))
    assert committed
    assert files(recipe) == committed
    assert verify_dataset(recipe.output) == []


def test_a_driver_stopped_within_the_selection_changes_no_rows(
    recipe: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed: dict[str, str] = {}
    real = preprocess.select_rows

    def slow(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(preprocess, "select_rows", real)
        change_input(tmp_path, 1)
        run_preprocess(recipe)
        committed.update(files(recipe))
        return real(*args, **kwargs)

    monkeypatch.setattr(preprocess, "select_rows", slow)
    with pytest.raises(ManifestMismatch, match="from other input"):
        run_preprocess(recipe)
    assert committed
    assert {name: digest for name, digest in files(recipe).items() if name in committed} == committed
    assert verify_dataset(recipe.output) == []


def test_a_driver_stopped_before_it_puts_a_shard_changes_none(
    recipe: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is made and read no more, so nothing but the look at the driver keeps it from its name."""
    committed: dict[str, str] = {}
    real = write_stage.write_shard

    def slow(*args: Any) -> Any:
        monkeypatch.setattr(write_stage, "write_shard", real)
        info = real(*args)
        change_input(tmp_path, 1)
        run_preprocess(recipe)
        committed.update(files(recipe))
        return info

    monkeypatch.setattr(write_stage, "write_shard", slow)
    monkeypatch.setattr(
        preprocess, "run_bounded", lambda fn, todo, **_: ((i, fn(item)) for i, item in enumerate(todo))
    )
    with pytest.raises(ManifestMismatch, match="from other input"):
        run_preprocess(recipe)
    assert committed
    assert files(recipe) == committed


@pytest.mark.parametrize("shuffle", ["none", "global"])
def test_the_selection_asks_before_it_puts_rows(
    recipe: PreprocessConfig, monkeypatch: pytest.MonkeyPatch, shuffle: Any
) -> None:
    real = preprocess.select_rows

    def replaced() -> None:
        raise Superseded("another job took over")

    def select(*args: Any, **kwargs: Any) -> Any:
        kwargs["guard"]()  # of the driver that still is the newest: says nothing
        return real(*args, **{**kwargs, "guard": replaced})

    monkeypatch.setattr(preprocess, "select_rows", select)
    with pytest.raises(Superseded):
        run_preprocess(replace(recipe, shards=ShardConfig(samples_per_shard=3, shuffle=shuffle)))
    assert not [name for name in files(recipe) if name.startswith("rows/")]


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_slower_of_two_equal_drivers_finds_the_set_committed(
    recipe: PreprocessConfig, moment: tuple[str, int]
) -> None:
    done: list[PreprocessSummary] = []
    summary = run_preprocess(recipe, once(moment, lambda: done.append(run_preprocess(recipe))))
    assert (summary.already_committed, summary.manifest_digest) == (True, done[0].manifest_digest)
    assert set(files(recipe)) == {"manifest.json", *load_dataset(recipe.output).files}


@pytest.mark.parametrize("until", ["stage", "select", "write", "commit"])
@pytest.mark.parametrize("moment", MOMENTS[1::2])
def test_the_older_of_two_unfinished_drivers_ends(
    recipe: PreprocessConfig, tmp_path: Path, moment: tuple[str, int], until: str
) -> None:
    """The newer one has come as far as `until`; a third run finishes what both left."""

    def other() -> None:
        change_input(tmp_path, 1)

        def stop(state: dict[str, Any]) -> None:
            if state["stage"] == until:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_preprocess(recipe, stop)

    with pytest.raises(Superseded, match="another job took over"):
        run_preprocess(recipe, once(moment, other))
    assert "manifest.json" not in files(recipe)
    summary = run_preprocess(recipe)
    assert verify_dataset(recipe.output) == []
    fresh = replace(recipe, output=str(tmp_path / "fresh"))
    assert summary.manifest_digest == run_preprocess(fresh).manifest_digest


def test_a_file_that_was_changed_meanwhile_is_not_committed(recipe: PreprocessConfig, tmp_path: Path) -> None:
    def spoil() -> None:
        (tmp_path / "set/rows/rows-000000.parquet").write_bytes(b"of another hand")

    with pytest.raises(StorageUnavailable, match=r"rows-000000\.parquet: 15 bytes, .*run the same command"):
        run_preprocess(recipe, once(("commit", 0), spoil))
    assert not run_preprocess(recipe).already_committed
    assert verify_dataset(recipe.output) == []


def test_a_cluster_that_is_not_there_claims_nothing(
    recipe: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead:
        def __init__(self, _: object) -> None: ...

        def __enter__(self) -> None:
            raise StorageUnavailable("no cluster")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(preprocess, "ray_session", Dead)
    with pytest.raises(StorageUnavailable, match="no cluster"):
        run_preprocess(recipe)
    assert not (tmp_path / "set").exists()


def test_a_full_disk_for_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = open_store(str(tmp_path / "source"))

    def fill() -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")

    says = f"^{tmp_path}: no space left .*set TMPDIR"
    with pytest.raises(StorageUnavailable, match=says), scratch_folder():
        fill()
    with pytest.raises(StorageUnavailable, match=says), scratch_folder():
        store._run("get_file", "a.tar", fill)
    with pytest.raises(StorageUnavailable, match=r"source/a\.tar: put failed"), scratch_folder():
        store._run("put", "a.tar", fill)
    with pytest.raises(OSError, match="other"), scratch_folder():
        raise OSError(errno.EPERM, "other")
    assert [path.name for path in tmp_path.iterdir()] == [f".maskclip-{os.getuid()}.lock"]
