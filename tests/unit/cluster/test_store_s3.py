"""An S3 store when the network and the server misbehave: real sockets, real servers, real process ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ObjectNotFound, StorageUnavailable
from cluster.store import StoreConfig, open_store
from tests.support.paths import ROOT
from tests.support.proxy import Proxy
from tests.support.s3_server import S3Server

TWICE = StoreConfig(attempts=2, backoff_seconds=0.01)


class LosingProxy(Proxy):
    """Closes the connection instead of returning the next `losses` good answers."""

    def __init__(self, target: int) -> None:
        self.losses = 0
        super().__init__(target)

    def passes_answer(self, data: bytes, server: socket.socket) -> bool:
        if self.losses and b" 200 " in data.partition(b"\r\n")[0]:
            self.losses -= 1
            return False
        return True


@pytest.fixture
def proxy(s3_env: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[LosingProxy]:
    proxy = LosingProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def silent_endpoint(monkeypatch: pytest.MonkeyPatch, s3_env: str) -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield s3_env


def test_lost_answers_are_retried(s3_env: str, proxy: LosingProxy, tmp_path: Path) -> None:
    store = open_store(s3_env, StoreConfig(backoff_seconds=0.01))
    proxy.losses = 2
    store.put("object", b"data")
    proxy.losses = 3
    assert store.get("object") == b"data"
    proxy.losses = 1
    store.get_file("object", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"data"
    assert proxy.losses == 0


def test_a_claim_whose_answer_was_lost_is_still_ours(s3_env: str, proxy: LosingProxy) -> None:
    store = open_store(s3_env, StoreConfig(backoff_seconds=0.01))
    for losses in (1, 2, 3):
        proxy.losses = losses
        assert store.put_if_absent(f"claim-{losses}", b"mine")
        assert proxy.losses == 0
        assert not store.put_if_absent(f"claim-{losses}", b"theirs")
        assert not store.put_if_absent(f"claim-{losses}", b"mine")
        assert store.get(f"claim-{losses}") == b"mine"


def test_attempts_are_bounded(s3_env: str, proxy: LosingProxy) -> None:
    store = open_store(s3_env, StoreConfig(attempts=3, backoff_seconds=0.01))
    proxy.losses = 1000
    with pytest.raises(StorageUnavailable, match=f"{s3_env}/object: put failed after 3 attempts"):
        store.put("object", b"data")


def test_a_silent_server_meets_the_deadline(silent_endpoint: str, tmp_path: Path) -> None:
    store = open_store(silent_endpoint, StoreConfig(deadline_seconds=0.3, attempts=2, backoff_seconds=0.01))
    (tmp_path / "file").write_bytes(b"data")
    for operation, call in {
        "get": lambda: store.get("object"),
        "put_file": lambda: store.put_file("object", tmp_path / "file"),
        "put_if_absent": lambda: store.put_if_absent("object", b"data"),
        "list": lambda: store.list(),
    }.items():
        with pytest.raises(StorageUnavailable, match=f"{operation} failed after 2 attempts: .*Timeout"):
            call()


def test_nothing_listening_is_unavailable(s3_env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match="get failed after 2 attempts: EndpointConnectionError"):
        open_store(s3_env, TWICE).get("object")


def test_a_missing_bucket_is_not_a_missing_object(s3_env: str, tmp_path: Path) -> None:
    store = open_store("s3://no-such-bucket/prefix")
    (tmp_path / "file").touch()
    for call in (
        lambda: store.get("object"),
        lambda: store.get_range("object", 0, 1),
        lambda: store.get_file("object", tmp_path / "target"),
        lambda: store.exists("object"),
        lambda: store.put("object", b""),
        lambda: store.put_file("object", tmp_path / "file"),
        lambda: store.put_if_absent("object", b""),
        lambda: store.list(),
        lambda: store.delete("object"),
    ):
        with pytest.raises(
            StorageUnavailable, match=r"s3://no-such-bucket/prefix.* after 1 attempt: .*bucket"
        ):
            call()


def test_wrong_credentials_fail_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3Server(tmp_path / "server", AUTH="true")
    server.start()
    try:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODY")
        with pytest.raises(StorageUnavailable, match="put failed after 1 attempt: PermissionError"):
            open_store("s3://bucket").put("object", b"")
    finally:
        server.kill()


def test_objects_survive_a_kill_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3Server(tmp_path / "server")
    server.start()
    try:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        store = open_store(server.make_bucket("bucket"), TWICE)
        store.put("object", b"data")
        server.kill()
        with pytest.raises(StorageUnavailable):
            store.get("object")
        server.start()
        assert store.get("object") == b"data"
        with pytest.raises(ObjectNotFound):
            store.get("other")
    finally:
        server.kill()


EXITS = {
    "idle": "",
    "error": "raise SystemExit(7)",
    "logging": "from cluster.events import EventLog\n"
    "EventLog(store, 1, 0, flush_seconds=0.001).instant('now')",
    "in flight": "import threading, time\n"
    "threading.Thread(target=store.list, daemon=True).start(); time.sleep(0.2)",
}


@pytest.mark.parametrize("end", EXITS)
@pytest.mark.parametrize("endpoint", ["s3_env", "silent_endpoint"])
def test_an_open_store_never_holds_the_interpreter(
    request: pytest.FixtureRequest, endpoint: str, end: str
) -> None:
    uri = request.getfixturevalue(endpoint)
    first = "store.put('object', b'data')" if endpoint == "s3_env" else ""
    program = f"from cluster.store import open_store\nstore = open_store({uri!r})\n{first}\n{EXITS[end]}\n"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ, timeout=60, capture_output=True, text=True
    )
    assert run.returncode == (7 if end == "error" else 0)
    assert run.stderr == ""
