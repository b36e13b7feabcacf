"""Object storage: one interface over a local folder and over S3. Start at `open_store`."""

from __future__ import annotations

from os.path import realpath
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.errors import ConfigError
from cluster.store_base import ObjectInfo, ObjectStore, StoreConfig
from cluster.store_local import LocalStore

_PATIENCE = StoreConfig()

__all__ = ["ObjectInfo", "ObjectStore", "StoreConfig", "normal_uri", "open_store", "overlap"]


def normal_uri(uri: str) -> str:
    """The one spelling of an address: an absolute folder (links are kept), or s3://bucket/prefix.

    Touches no storage. Raises ConfigError for what no store can be opened at.
    """
    if not uri.isprintable():
        raise ConfigError(f"{uri!r}: holds a line break or another character that does not print; remove it")
    scheme, separator, rest = uri.partition("://")
    path = uri
    if separator and scheme == "s3":
        bucket, _, prefix = rest.strip("/").partition("/")
        if not bucket:
            raise ConfigError(f"{uri}: no bucket; write s3://bucket/prefix")
        if {".", ".."} & set(rest.split("/")):
            raise ConfigError(f"{uri}: holds a . or .., which a bucket does not follow; write it without")
        return f"s3://{bucket}/{prefix}".rstrip("/")
    if separator and scheme != "file":
        raise ConfigError(f"{uri}: unknown storage scheme {scheme!r}; use a folder path, file:// or s3://")
    if separator:
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(f"{uri}: not a local folder; write file:///absolute/path, or just the path")
        path = unquote(parts.path)
    if not path:
        raise ConfigError("the storage address is empty; use a folder path, file:// or s3://")
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        raise ConfigError(f"{uri}: there is no such user; write the path of the folder") from None


def overlap(a: str, b: str) -> bool:
    """Whether one of two addresses is, or lies inside, the other; links and ``..`` are followed."""
    one, other = (uri if uri.startswith("s3://") else realpath(uri) for uri in map(normal_uri, (a, b)))
    one, other = one.rstrip("/") + "/", other.rstrip("/") + "/"
    return one.startswith(other) or other.startswith(one)


def open_store(uri: str, config: StoreConfig = _PATIENCE) -> ObjectStore:
    """The store at `uri`: a folder path, `file:///folder`, or `s3://bucket/prefix`.

    S3 takes its endpoint from AWS_ENDPOINT_URL and its credentials from the AWS_* environment. Opening does
    not connect: a wrong bucket or key shows at the first operation. Raises ConfigError for any other address.
    """
    normal = normal_uri(uri)
    if normal.startswith("s3://"):
        # Imported here: it costs half a second, which the many processes of a local run need not pay.
        from cluster.store_s3 import S3Store

        return S3Store(normal, config)
    if Path(normal).is_file():
        raise ConfigError(f"{uri}: is a file; a store needs a folder, so choose another path")
    return LocalStore(normal, config)
