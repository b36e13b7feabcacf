"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.support import ceph_server
from tests.support.ceph_server import CephServer
from tests.support.s3_server import S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3-compatible server for the whole session."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephServer]:
    """Ceph's object gateway for the whole session. Skips where it is not installed, unless
    MASKCLIP_TEST_CEPH says that it must be."""
    reason = ceph_server.missing()
    if reason is not None:
        insisted = os.environ.get("MASKCLIP_TEST_CEPH") == "required"
        (pytest.fail if insisted else pytest.skip)(f"Ceph's object gateway cannot be started: {reason}")
    server = CephServer(tmp_path_factory.mktemp("ceph") / "cluster")
    server.start()
    yield server
    server.kill()


def fresh_bucket(server: S3Server | CephServer, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server.make_bucket(f"bucket-{secrets.token_hex(4)}")


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a fresh bucket, with the environment set so that the store finds its server."""
    return fresh_bucket(s3_server, monkeypatch)


@pytest.fixture
def ceph_env(gateway: CephServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same on Ceph."""
    return fresh_bucket(gateway, monkeypatch)


@pytest.fixture(params=["s3_env", "ceph_env"])
def any_s3(request: pytest.FixtureRequest) -> str:
    """The same on one after the other."""
    return request.getfixturevalue(request.param)
