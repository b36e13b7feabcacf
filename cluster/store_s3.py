"""An object store in an S3 bucket, through s3fs.

s3fs gives the session, the event loop and the multipart transfers. Its own retries, listing cache and
instance cache are off: retries happen in `ObjectStore._run`, and a listing must show what other processes
wrote. Every call has a deadline, because a connection that went silent would otherwise hold a training run
for ever.

A filesystem belongs to one process: its event loop does not survive a fork. `_filesystem` opens one per
process and per set of credentials.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import ClientError as AioHttpError
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, ResponseStreamingError
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from cluster.store_base import Fault, Listing, ObjectInfo, ObjectStore, StoreConfig, checked_key, staged

_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
# A transfer may take its deadline plus the time that its bytes need at this rate.
_SLOWEST_BYTES_PER_SECOND = 8 << 20

_MISSING_CODES = {"NoSuchKey", "404"}
_TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "NoSuchUpload",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_STATUS = {408, 409, 429}
_TRANSIENT_ERRORS = (
    AioHttpError,
    BotoConnectionError,
    ConnectionError,
    HTTPClientError,
    ResponseParserError,
    ResponseStreamingError,
    TimeoutError,
)

T = TypeVar("T")


class S3Store(ObjectStore):
    """Objects under `s3://bucket/prefix`. Endpoint, region and credentials come from the environment."""

    def __init__(self, uri: str, config: StoreConfig) -> None:
        super().__init__(uri, config)
        self._bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def get(self, key: str) -> bytes:
        return self._call("get", key, lambda fs: _read(fs, **self._at(key)))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:
            return b""

        async def read(fs: S3FileSystem) -> bytes:
            try:
                return await _read(fs, **self._at(key), Range=f"bytes={start}-{start + length - 1}")
            except OSError as exc:
                if _status(exc) == 416:  # the object ends before `start`
                    return b""
                raise

        return self._call("get_range", key, read, length)

    def get_file(self, key: str, path: Path) -> None:
        size = self.size(key)

        async def download(fs: S3FileSystem) -> None:
            with staged(path) as temporary:
                await fs._get_file(
                    self._path(key), str(temporary), chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
                )
                temporary.replace(path)

        self._call("get_file", key, download, size)

    def size(self, key: str) -> int:
        async def head(fs: S3FileSystem) -> int:
            try:
                return (await fs._call_s3("head_object", **self._at(key)))["ContentLength"]
            except FileNotFoundError:
                # A HEAD answer has no body, so only a listing tells a missing object from a missing bucket.
                await fs._call_s3("list_objects_v2", **self._listed(key), MaxKeys=1)
                raise

        return self._call("size", key, head)

    def put(self, key: str, data: bytes) -> None:
        async def upload(fs: S3FileSystem) -> None:
            await fs._pipe_file(self._path(key), data, chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

        self._call("put", key, upload, len(data))

    def put_file(self, key: str, path: Path) -> None:
        async def upload(fs: S3FileSystem) -> None:
            await fs._put_file(
                str(path), self._path(key), chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
            )

        self._call("put_file", key, upload, path.stat().st_size)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        # The answer to a write that succeeded may be lost. The next attempt, ours or a hidden one of aiohttp
        # (which repeats a PUT when the connection breaks), then gets 412; this mark tells that the object is
        # ours all the same.
        mark = {"writer": secrets.token_hex(16)}

        async def create(fs: S3FileSystem) -> bool:
            # The client itself, because s3fs drops arguments that an old botocore does not know: without the
            # condition this would overwrite. And s3fs turns 412 into EINVAL on most servers.
            client = await fs.set_session()
            try:
                await client.put_object(**self._at(key), Body=data, IfNoneMatch="*", Metadata=mark)
            except ClientError as exc:
                if _status(exc) != 412:
                    raise
                return (await client.head_object(**self._at(key)))["Metadata"] == mark
            return True

        return self._call("put_if_absent", key, create, len(data))

    def list(self, prefix: str = "") -> Listing:
        async def pages(fs: S3FileSystem) -> Listing:
            found, more = [], {}
            while True:
                page = await fs._call_s3("list_objects_v2", **self._listed(prefix), **more)
                found += [
                    ObjectInfo(item["Key"].removeprefix(self._prefix), item["Size"])
                    for item in page.get("Contents", [])
                    if not item["Key"].endswith("/")  # a "folder" that some browser of buckets made
                ]
                if not page.get("IsTruncated"):
                    return sorted(found)
                more = {"ContinuationToken": page["NextContinuationToken"]}

        return self._call("list", prefix, pages)

    def delete(self, key: str) -> None:
        async def remove(fs: S3FileSystem) -> None:
            await fs._call_s3("delete_object", **self._at(key))

        self._call("delete", key, remove)

    def child(self, prefix: str) -> S3Store:
        return S3Store(f"{self.uri}/{checked_key(prefix)}", self.config)

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked_key(key)}

    def _listed(self, prefix: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Prefix": self._prefix + prefix}

    def _path(self, key: str) -> str:
        return f"{self._bucket}/{self._prefix}{checked_key(key)}"

    def _call(
        self, operation: str, key: str, function: Callable[[S3FileSystem], Awaitable[T]], size: int = 0
    ) -> T:
        """Run one coroutine on the event loop of s3fs; `size` is the number of bytes that it moves."""
        deadline = self.config.deadline_seconds + size / _SLOWEST_BYTES_PER_SECOND

        def attempt() -> T:
            fs = _filesystem()
            result: Any = sync(fs.loop, function, fs, timeout=deadline)
            return result

        return self._run(operation, key, attempt)

    def _fault(self, exc: BaseException) -> Fault | None:
        answer = _answer(exc)
        if answer is not None:
            code, status = answer.response.get("Error", {}).get("Code", ""), _status(exc)
            if code in _MISSING_CODES:
                return Fault.MISSING
            transient = code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS or status >= 500
            return Fault.TRANSIENT if transient else Fault.FATAL
        if isinstance(exc, _TRANSIENT_ERRORS):
            return Fault.TRANSIENT
        return Fault.FATAL if isinstance(exc, BotoCoreError) else None


_open: dict[tuple[object, ...], S3FileSystem] = {}


def _filesystem() -> S3FileSystem:
    """This process's filesystem. After a fork the parent's stay in `_open`: they cannot be closed here."""
    identity = (os.getpid(), *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    if identity not in _open:
        fs = S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60},
        )
        fs.retries = 1
        # Two threads may come here at once: both then take the one that was first, and the other never
        # connects.
        _open.setdefault(identity, fs)
    return _open[identity]


async def _read(fs: S3FileSystem, **request: Any) -> bytes:
    response = await fs._call_s3("get_object", **request)
    async with response["Body"] as body:
        return await body.read()


def _answer(exc: BaseException | None) -> ClientError | None:
    """The server's answer behind an exception: s3fs turns it into an OSError and keeps it as the cause."""
    if isinstance(exc, ClientError):
        return exc
    return exc.__cause__ if exc is not None and isinstance(exc.__cause__, ClientError) else None


def _status(exc: BaseException) -> int:
    answer = _answer(exc)
    return 0 if answer is None else answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
