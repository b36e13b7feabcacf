"""Fixtures that several test folders share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.support.s3_server import S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3-compatible server for the whole session."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a fresh bucket, with the environment set so that the store finds its server."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server.make_bucket(f"bucket-{secrets.token_hex(4)}")
