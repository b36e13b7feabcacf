"""A folder is real only when its manifest is there, and a manifest tells every damage."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ManifestMismatch, ObjectNotFound
from cluster.manifest import MANIFEST, FileEntry, Manifest, commit, file_entry, load, sha256_file, verify
from cluster.store import ObjectStore, open_store

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(params=["local", "s3_env", "ceph_env"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return open_store(
        str(tmp_path / "set") if request.param == "local" else request.getfixturevalue(request.param)
    )


def write_folder(store: ObjectStore, folder: Path) -> Manifest:
    """Two files in the store, and the manifest that would commit them."""
    entries = []
    for name, data in {"shard-1.tar": b"one", "sub/shard-0.tar": b"zero" * 5000}.items():
        path = folder / "file"
        path.write_bytes(data)
        store.put_file(name, path)
        entries.append(file_entry(path, name))
    return Manifest("dataset", 1, tuple(entries), {"counts": {"é": 2}})


@given(
    st.permutations([FileEntry(name, 1, "0") for name in "abcd"]),
    st.dictionaries(st.text(), JSON, max_size=4),
)
def test_the_digest_depends_on_content_only(files: list[FileEntry], meta: dict[str, object]) -> None:
    first = Manifest("dataset", 1, tuple(files), meta)
    second = Manifest(
        "dataset", 1, tuple(sorted(files, key=lambda entry: entry.name)), dict(reversed(meta.items()))
    )
    assert first.to_bytes() == second.to_bytes()
    assert first.digest == second.digest
    assert first.digest != Manifest("dataset", 2, tuple(files), meta).digest
    assert json.loads(first.to_bytes())["meta"] == meta


def test_commit_makes_a_folder_real_once(store: ObjectStore, tmp_path: Path) -> None:
    manifest = write_folder(store, tmp_path)
    with pytest.raises(ObjectNotFound, match=r"no manifest\.json, so this is not a committed dataset"):
        load(store, "dataset")
    assert commit(store, manifest)
    assert not commit(store, manifest)
    assert load(store, "dataset").digest == manifest.digest
    with pytest.raises(ManifestMismatch, match="another committed dataset"):
        commit(store, Manifest("dataset", 1, manifest.files, {"counts": {}}))
    assert load(store, "dataset").digest == manifest.digest


def test_of_racing_commits_one_wins(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    outcomes: list[str] = []

    def race(number: int) -> None:
        try:
            outcomes.append(str(commit(store, Manifest("dataset", 1, (), {"number": number % 2}))))
        except ManifestMismatch:
            outcomes.append("mismatch")

    threads = [Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["False"] * 3 + ["True"] + ["mismatch"] * 4


def test_verify_names_every_damage(store: ObjectStore, tmp_path: Path) -> None:
    manifest = write_folder(store, tmp_path)
    assert verify(store, manifest) == []
    data = bytearray(store.get("sub/shard-0.tar"))
    data[7000] ^= 1
    store.put("sub/shard-0.tar", bytes(data))
    assert verify(store, manifest, deep=False) == []
    (problem,) = verify(store, manifest)
    assert f"{store.uri}/sub/shard-0.tar: sha256" in problem
    store.put("sub/shard-0.tar", bytes(data[:-1]))
    store.delete("shard-1.tar")
    problems = verify(store, manifest, deep=False)
    assert [problem.removeprefix(store.uri) for problem in problems] == [
        "/shard-1.tar: missing",
        "/sub/shard-0.tar: size 19999, manifest says 20000",
    ]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"kind":"dataset","version":1,"files":[{}],"meta":{}}',
        b'{"kind":"dataset","version":1,"files":[{"name":"../x","size":1,"sha256":"0"}],"meta":{}}',
        b'{"kind":"dataset","version":2,"files":[],"meta":{}}',
        b'{"kind":"checkpoint","version":1,"files":[],"meta":{}}',
        b"\xff\xfe",
    ],
)
def test_what_is_not_this_kind_of_manifest_is_refused(tmp_path: Path, data: bytes) -> None:
    store = open_store(str(tmp_path))
    store.put(MANIFEST, data)
    with pytest.raises(ManifestMismatch, match=str(tmp_path)):
        load(store, "dataset")


def test_checksum_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_entry(path, "a/b") == FileEntry("a/b", 3, sha256_file(path))
