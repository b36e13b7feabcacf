"""Laws of an object store, on a local folder and on two real S3 servers alike."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import secrets
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path

import pytest

from cluster.errors import ConfigError, DataError, ObjectNotFound, StorageUnavailable
from cluster.store import ObjectInfo, ObjectStore, StoreConfig, normal_uri, open_store, overlap
from tests.support.s3_server import S3Server
from tests.unit.cluster import children


@pytest.fixture(params=["local", "s3_env", "ceph_env"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    root = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue(request.param)
    return open_store(f"{root}/runs/first")


def test_what_is_put_is_read_back(store: ObjectStore, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    for data in (b"", b"x", secrets.token_bytes(100_000)):
        source.write_bytes(data)
        store.put("a/bytes", data)
        store.put_file("a/file", source)
        for key in ("a/bytes", "a/file"):
            assert store.get(key) == data
            assert store.size(key) == len(data)
            assert store.exists(key)
            store.get_file(key, target)
            assert target.read_bytes() == data
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_large_file_takes_several_parts(store: ObjectStore, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    data = secrets.token_bytes(1 << 20) * 35 + b"tail"
    source.write_bytes(data)
    store.put_file("large", source)
    store.get_file("large", target)
    assert target.read_bytes() == data
    store.put("large", data[::-1])
    assert store.get("large") == data[::-1]


def test_pieces_become_one_object(store: ObjectStore) -> None:
    data = secrets.token_bytes(1 << 20)
    store.put_pieces(
        "object", lambda: (memoryview(data)[at : at + 300_000] for at in range(0, 1 << 20, 300_000))
    )
    assert store.get("object") == data

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.put_pieces("object", broken)
    assert store.get("object") == data


def test_a_range_is_a_slice(store: ObjectStore) -> None:
    data = bytes(range(200))
    store.put("object", data)
    store.put("empty", b"")
    for start in (0, 1, 150, 199, 200, 1000):
        for length in (0, 1, 50, 1000):
            assert store.get_range("object", start, length) == data[start : start + length]
    assert store.get_range("empty", 0, 10) == b""


def test_a_listing_is_sorted_recursive_and_never_cached(store: ObjectStore) -> None:
    assert store.list() == []
    keys = ["b", "a/z", "a/b/c", "a-1", "ab"]
    for key in keys:
        store.put(key, key.encode())
        assert key in [info.key for info in store.list()]
    assert store.list() == [ObjectInfo(key, len(key)) for key in sorted(keys)]
    assert [info.key for info in store.list("a/")] == ["a/b/c", "a/z"]
    assert [info.key for info in store.list("a")] == ["a-1", "a/b/c", "a/z", "ab"]
    assert [info.key for info in store.list("none/")] == []
    assert [info.key for info in store.child("a").list()] == ["b/c", "z"]
    assert store.child("a/b").get("c") == b"a/b/c"
    store.delete("a/z")
    assert [info.key for info in store.list("a/")] == ["a/b/c"]


def test_a_listing_has_no_end_at_one_page(s3_env: str, s3_server: S3Server) -> None:
    keys = [f"k{number:04d}" for number in range(1001)]  # S3 gives a thousand at a time
    connection = HTTPConnection("127.0.0.1", s3_server.port)
    for key in keys:
        connection.request("PUT", f"/{s3_env.removeprefix('s3://')}/{key}", b"")
        connection.getresponse().read()
    connection.close()
    assert [info.key for info in open_store(s3_env).list()] == keys


def test_a_missing_object_is_named_by_its_address(store: ObjectStore, tmp_path: Path) -> None:
    store.put("folder/object", b"")
    reads = [
        lambda key: store.get(key),
        lambda key: store.get_range(key, 0, 1),
        lambda key: store.get_file(key, tmp_path / "target"),
        lambda key: store.size(key),
    ]
    for key in ("nothing", "folder"):
        for read in reads:
            with pytest.raises(ObjectNotFound, match=f"{store.uri}/{key}: no such object"):
                read(key)
        assert not store.exists(key)
        store.delete("nothing")
    assert not (tmp_path / "target").exists()
    with pytest.raises(FileNotFoundError):
        store.put_file("object", tmp_path / "absent")


def test_keys_cannot_leave_the_store(store: ObjectStore) -> None:
    for key in ("", "/etc/passwd", "../other", "a//b", "a/./b", "a/", ".tmp-1", "a\0b"):
        with pytest.raises(ValueError, match="not an object key"):
            store.put(key, b"")


def test_of_sixteen_racing_writers_one_wins(store: ObjectStore) -> None:
    for number, winners in enumerate(children.race(store)):
        assert len(winners) == 1
        assert store.get(f"claim-{number}") == winners[0].encode()


def test_put_if_absent_keeps_what_is_there(store: ObjectStore) -> None:
    assert store.put_if_absent("claim", b"first")
    assert not store.put_if_absent("claim", b"second")
    assert not store.put_if_absent("claim", b"first")
    assert store.get("claim") == b"first"


@pytest.mark.parametrize(
    "context",
    [multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")],
    ids=["spawn", "fork"],
)
def test_a_store_works_in_other_processes(store: ObjectStore, context: SpawnContext | ForkContext) -> None:
    store.put("object", b"data")
    answers = context.Queue()
    process = context.Process(target=children.read_object, args=(store, "object", answers))
    process.start()
    assert answers.get(timeout=60) == b"data"
    process.join()
    assert store.get("object") == b"data"


def test_a_store_pickles_to_its_address() -> None:
    for uri in ("s3://bucket/prefix", "/data/runs"):
        store = open_store(uri, StoreConfig(attempts=2))
        copy = pickle.loads(pickle.dumps(store))
        assert (copy.uri, copy.config) == (store.uri, store.config) == (uri, StoreConfig(attempts=2))


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("runs/a").uri == f"{tmp_path}/runs/a"
    assert open_store(f"file://{tmp_path}/with%20space").uri == f"{tmp_path}/with space"
    assert open_store("s3://bucket/").uri == "s3://bucket"
    assert open_store("s3://bucket/a/").child("b").uri == "s3://bucket/a/b"
    (tmp_path / "file").touch()
    refused = ("", "gs://bucket/x", "s3://", "s3://x/..", "file://host/x", "http://x", "a\nb", "~no-such/x")
    for uri in refused:
        for check in (open_store, normal_uri):
            with pytest.raises(ConfigError):
                check(uri)
    assert normal_uri(str(tmp_path / "file")) == f"{tmp_path}/file"
    with pytest.raises(ConfigError, match="is a file"):
        open_store(str(tmp_path / "file"))


def test_addresses_overlap_where_one_is_or_holds_the_other(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    for one, other in (("a", "a/"), ("a/b", "a"), ("a", "c/../a/b"), ("link/b", "a"), (".", "a")):
        assert overlap(f"{tmp_path}/{one}", f"file://{tmp_path}/{other}")
        assert overlap(f"{tmp_path}/{other}", f"{tmp_path}/{one}")
    assert overlap("s3://b", "s3://b/x")
    for one, other in (("a", "ab"), ("a/b", "a/c"), ("s3://b/x", "s3://b/xy"), ("s3://b/x", "b/x")):
        assert not overlap(one, other)


def test_a_link_to_itself_is_bad_data_and_not_a_fault_of_the_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("b", b"")
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(DataError, match=f"{tmp_path}/a: is a symbolic link that leads back to itself"):
        store.list()
    with pytest.raises(ObjectNotFound):
        store.get("a")


def test_a_kill_while_writing_leaves_no_half_object(tmp_path: Path) -> None:
    size = 8 << 20
    context = multiprocessing.get_context("spawn")
    store = open_store(str(tmp_path / "store"))
    leftovers = 0
    for delay in random.Random(0).choices(range(60), k=6):
        arguments = (store.uri, size, str(tmp_path / "source"))
        process = context.Process(target=children.write_for_ever, args=arguments)
        process.start()
        while not store.list():
            time.sleep(0.005)
        time.sleep(delay / 1000)
        process.kill()
        process.join()
        for info in store.list():
            data = store.get(info.key)
            assert info.size == size
            assert data == data[:1] * size
            store.delete(info.key)
        leftovers += len(list((tmp_path / "store").iterdir()))
    assert leftovers > 0, "no kill hit a write, so this test has shown nothing"


def test_a_folder_that_is_a_file_is_unavailable(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a", b"")
    with pytest.raises(StorageUnavailable, match=f"{tmp_path}/a is a file"):
        store.put("a/b", b"")
    with pytest.raises(ObjectNotFound):
        store.get("a/b")
