"""The committed demo data are what their list, their README and the demo rely on."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from functools import cache

import pyarrow.parquet as pq
from PIL import Image

from tests.support.paths import ROOT

FOLDER = ROOT / "examples/emoji"
MOST_BYTES = 12_000_000


@cache
def samples(part: str) -> dict[str, dict[str, bytes]]:
    """key -> {extension: bytes}, in the order of the tars."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((FOLDER / part).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                data = tar.extractfile(member)
                assert data is not None
                found.setdefault(key, {})[extension] = data.read()
    return found


def test_files_are_those_of_the_list():
    listed = [line.split("  ") for line in (FOLDER / "emoji.sha256").read_text("utf-8").splitlines()]
    files = [path for part in ("train", "eval") for path in (FOLDER / part).iterdir()]
    there = {f"{path.parent.name}/{path.name}" for path in files}
    assert {name for _, name in listed} == there
    assert [
        name for digest, name in listed if hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() != digest
    ] == []


def test_size():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MOST_BYTES


def test_every_sample_has_a_picture_a_caption_and_a_record():
    for part in ("train", "eval"):
        for key, sample in samples(part).items():
            image = sample.get("png") or sample["jpg"]
            record = json.loads(sample["json"])
            assert (record["key"], record["caption"]) == (key, sample["txt"].decode())
            with Image.open(io.BytesIO(image)) as picture:
                assert picture.size == (record["width"], record["height"])


def test_the_tables_list_the_same_samples():
    for part in ("train", "eval"):
        tables = [pq.read_table(path) for path in sorted((FOLDER / part).glob("*.parquet"))]
        rows = [row for table in tables for row in table.to_pylist()]
        assert rows == [json.loads(sample["json"]) for sample in samples(part).values()]


def test_the_same_concepts_in_other_styles_and_other_words():
    train = [json.loads(sample["json"]) for sample in samples("train").values()]
    held_out = [json.loads(sample["json"]) for sample in samples("eval").values()]
    concepts = {row["concept"] for row in held_out}
    assert len(concepts) == len(held_out) == 600
    assert Counter((row["concept"], row["style"]) for row in train) == Counter(
        (concept, style) for concept in concepts for style in ("google", "twitter")
    )
    assert {row["style"] for row in held_out} == {"fluent-3d"}
    assert len({row["caption"] for row in held_out}) == len(held_out)
    assert len({row["caption"] for row in train}) > 1.9 * len(concepts)


def test_every_tar_is_mixed():
    for path in sorted((FOLDER / "train").glob("*.parquet")):
        styles = Counter(pq.read_table(path).column("style").to_pylist())
        assert min(styles["google"], styles["twitter"]) >= 30
