"""What tells two data sets apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.upkeep import scan
from data_pipeline.upkeep.diff import EXAMPLES, diff_datasets, differences
from tests.support.small_set import small_sample, write_set


def test_a_set_is_like_itself_in_another_place_cut_and_format(tmp_path: Path) -> None:
    write_set(tmp_path / "a", (3, 2), format="tar")
    write_set(tmp_path / "b", (1, 4), format="arrow")
    found = diff_datasets(str(tmp_path / "a"), str(tmp_path / "b"))
    assert found["same"] == 5
    assert [found[name]["count"] for name in ("only_a", "only_b", "changed")] == [0, 0, 0]
    assert found["recipe"] == found["counts"] == {}


@pytest.mark.parametrize("bucket_bytes", [1 << 26, 100])
def test_samples_only_in_one_and_changed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    monkeypatch.setattr(scan, "BUCKET_BYTES", bucket_bytes)
    write_set(tmp_path / "a", (9, 3), recipe={"x": {"y": 1, "z": 2}})
    changes = {1: {"caption": "other"}, 2: {"sha256": bytes(32)}, 3: {"url": "https://example.org/moved"}}
    write_set(tmp_path / "b", (4,), ("small",), changes=changes, recipe={"x": {"y": 3}, "w": 4})
    found = diff_datasets(str(tmp_path / "a"), str(tmp_path / "b"))
    assert found["same"] == 2
    assert found["only_a"]["count"] == 8
    least = sorted((small_sample(number) for number in range(4, 12)), key=lambda sample: sample.id)
    examples = found["only_a"]["examples"]
    assert [one["source"] for one in examples] == [sample.source for sample in least[:EXAMPLES]]
    assert found["only_b"] == {"count": 0, "examples": []}
    assert found["changed"]["count"] == 2
    by_id = {one["id"]: one for one in found["changed"]["examples"]}
    assert by_id[small_sample(1).id] == {"id": small_sample(1).id, "caption": ["é é", "other"]}
    image = [small_sample(2).sha256.hex(), bytes(32).hex()]
    assert by_id[small_sample(2).id] == {"id": small_sample(2).id, "image": image}
    assert found["recipe"] == {"w": [None, 4], "x.y": [1, 3], "x.z": [2, None]}
    assert found["counts"]["kept"] == [12, 4]


def test_the_other_way_round_is_the_mirror(tmp_path: Path) -> None:
    write_set(tmp_path / "a", (3,))
    write_set(tmp_path / "b", (2, 2), changes={0: {"caption": "new"}})
    there = diff_datasets(str(tmp_path / "a"), str(tmp_path / "b"))
    back = diff_datasets(str(tmp_path / "b"), str(tmp_path / "a"))
    assert there["only_a"] == back["only_b"]
    assert there["only_b"] == back["only_a"]
    assert there["changed"]["examples"][0]["caption"] == back["changed"]["examples"][0]["caption"][::-1]


def test_differences_of_nested_values() -> None:
    assert differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 1}, "c": [1]}) == {}
    assert differences({"a": {"b": 1}}, {"a": 2}) == {"a": [None, 2], "a.b": [1, None]}
