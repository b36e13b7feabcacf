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
from data_pipeline import ledger
from data_pipeline.catalog import load_dataset, verify_dataset
from data_pipeline.preprocess import PreprocessConfig, PreprocessSummary, run_preprocess
from data_pipeline.sources import SourceConfig
from data_pipeline.transforms import TransformConfig
from tests.support.raw_input import encode, members, noise, write_tar

ROOT = Path(__file__).parents[3]
CHUNKS = 6
# A driver of its own, which kills itself after some chunks: python -c DRIVER <source> <output> [<chunks>]
DRIVER = """
import os, signal, sys
from data_pipeline.preprocess import PreprocessConfig, run_preprocess
from data_pipeline.sources import SourceConfig
from data_pipeline.transforms import TransformConfig
source = SourceConfig(uri=sys.argv[1])
transform = TransformConfig(short_side=48)
config = PreprocessConfig(source=source, output=sys.argv[2], transform=transform, window=2, workers=1)
def progress(counts):
    if sys.argv[3:] == [str(counts["chunks_done"])]:
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
        source=SourceConfig(uri=str(raw)), output=str(to), transform=TransformConfig(short_side=48)
    )
    return replace(base, **changes)


def digests(store: ObjectStore) -> dict[str, str]:
    """sha256 of every object under the output, the ledger and the manifest included."""
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key, _ in store.list()}


@pytest.fixture(scope="module")
def done(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreprocessSummary]:
    output = tmp_path_factory.mktemp("done") / "set"
    return output, run_preprocess(config(raw, output, window=1))


def test_every_row_is_a_sample_or_a_reject(done: tuple[Path, PreprocessSummary]) -> None:
    output, summary = done
    dataset = load_dataset(str(output))
    assert summary.samples == dataset.num_samples == 8 * (CHUNKS - 1)
    assert summary.shards == len(dataset.shards) == CHUNKS - 1
    assert summary.rejects == {"no_caption": 1, "no_image": 2, "too_many_pixels": 2, "undecodable": 1}
    assert dataset.counts["rows_in"] == dataset.counts["kept"] + dataset.counts["rejected"] == 46
    assert (summary.skipped_shards, summary.already_committed) == (0, False)
    rejects = pq.read_table(output / "rejects.parquet").to_pylist()
    assert [(row["source"], row["reason"]) for row in rejects] == [
        ("00001.tar/broken", "undecodable"),
        ("00001.tar/bare", "no_caption"),
        ("00001.tar/huge", "too_many_pixels"),
        ("00003.tar/huge", "too_many_pixels"),
        ("00004.tar/a", "no_image"),
        ("00004.tar/b", "no_image"),
    ]
    assert all(row["detail"] for row in rejects)
    assert verify_dataset(str(output)) == []


def test_the_bytes_do_not_depend_on_the_number_of_workers_or_the_place(
    done: tuple[Path, PreprocessSummary], raw: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(raw)
    counts = []
    summary = run_preprocess(config(moved, tmp_path / "set", window=5), counts.append)
    assert summary.manifest_digest == done[1].manifest_digest
    assert digests(open_store(str(tmp_path / "set"))) == digests(open_store(str(done[0])))
    assert [c["chunks_done"] for c in counts] == list(range(CHUNKS + 1))
    assert counts[-1] == {"chunks": CHUNKS, "chunks_done": CHUNKS, "samples": 40, "rejected": 6, "skipped": 0}


def test_a_killed_job_is_continued_to_the_same_bytes(
    done: tuple[Path, PreprocessSummary], raw: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    child = subprocess.run([sys.executable, "-c", DRIVER, str(raw), str(output), "2"], cwd=ROOT)
    assert child.returncode == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    assert run_preprocess(config(raw, output)).skipped_shards >= 2
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


def test_a_rerun_does_what_is_missing_and_no_more(raw: Path, tmp_path: Path) -> None:
    run_preprocess(config(raw, tmp_path))
    before = digests(open_store(str(tmp_path)))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard-000002.tar").unlink()
    with (tmp_path / "shard-000003.arrow").open("ab") as file:
        file.write(b"x")
    untouched = (tmp_path / "shard-000001.tar").stat().st_mtime_ns
    assert run_preprocess(config(raw, tmp_path)).skipped_shards == CHUNKS - 2
    assert digests(open_store(str(tmp_path))) == before
    assert (tmp_path / "shard-000001.tar").stat().st_mtime_ns == untouched


def test_a_committed_set_is_left_alone(
    done: tuple[Path, PreprocessSummary], raw: Path, tmp_path: Path
) -> None:
    output, first = done
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = run_preprocess(config(raw, output))
    assert again.already_committed
    assert replace(again, already_committed=False, skipped_shards=0, seconds=first.seconds) == first
    with pytest.raises(ManifestMismatch, match="by another recipe"):
        run_preprocess(config(raw, output, transform=TransformConfig(short_side=40)))
    write_tar(tmp_path / "other.tar", members("a", 0))
    with pytest.raises(ManifestMismatch, match="from other input"):
        run_preprocess(config(tmp_path, output))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


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
    assert (summary.samples, summary.skipped_shards) == (3, 2)


def test_a_changed_input_is_read_again(tmp_path: Path) -> None:
    """The name and the size of the new shard could equal those of the old one: the record has to go."""
    raw, output = tmp_path / "raw", tmp_path / "set"
    write_tar(raw / "0.tar", members("a", 0))
    write_tar(raw / "1.tar", [("b.txt", b"no image")])
    run_preprocess(config(raw, output))
    (output / "manifest.json").unlink()
    write_tar(raw / "1.tar", members("b", 1) + members("c", 2) + members("d", 3))
    assert run_preprocess(config(raw, output)).samples == 4
    assert verify_dataset(str(output)) == []


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
    with pytest.raises(DataError, match=r"empty, .*\(no_image 1, undecodable 1\)"):
        run_preprocess(config(raw, output))
    assert not (output / "manifest.json").exists()


def test_one_id_for_two_rows_is_an_error(tmp_path: Path) -> None:
    """Only a collision of hashes can do that, so the second record is forged from the first."""
    raw, output = tmp_path / "raw", tmp_path / "set"
    for index in range(2):
        write_tar(raw / f"{index}.tar", members("a", 0))
    run_preprocess(config(raw, output))
    (output / "manifest.json").unlink()
    first, second = sorted(output.glob("ledger/*/rows-*.parquet"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="1 ids belong to several samples"):
        run_preprocess(config(raw, output))
    assert not (output / "manifest.json").exists()


def test_a_folder_is_read_as_shards_of_the_wanted_size(tmp_path: Path) -> None:
    raw, output = tmp_path / "raw", tmp_path / "set"
    raw.mkdir()
    for i in range(5):
        for name, payload in members(f"{i}", i):
            (raw / name).write_bytes(payload)
    source = SourceConfig(uri=str(raw), kind="folder")
    summary = run_preprocess(config(raw, output, source=source, samples_per_shard=2))
    assert (summary.samples, summary.shards) == (5, 3)
    with pytest.raises(ManifestMismatch, match="cut otherwise"):
        run_preprocess(config(raw, output, source=source, samples_per_shard=3))
    (output / "manifest.json").unlink()
    assert run_preprocess(config(raw, output, source=source, samples_per_shard=3)).shards == 2
    assert sorted(path.name for path in output.glob("shard-*.tar")) == [
        "shard-000000.tar",
        "shard-000001.tar",
    ]
    assert len(list(output.glob("ledger/*/chunk-*"))) == 2


def test_the_output_must_not_lie_in_the_input(raw: Path) -> None:
    for output in (raw, raw / "set"):
        with pytest.raises(ConfigError, match="lies inside the source"):
            run_preprocess(config(raw, output))


@pytest.mark.parametrize(
    "wrong", [{"output": ""}, {"samples_per_shard": 0}, {"window": 0}, {"retries": -1}, {"workers": 0}]
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"set {next(iter(wrong))} to"):
        config("in", "out", **wrong)
