"""Object storage: one interface over a local folder and over S3. Start at `open_store`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.errors import ConfigError
from cluster.store_base import ObjectInfo, ObjectStore, StoreConfig
from cluster.store_local import LocalStore

_PATIENCE = StoreConfig()

__all__ = ["ObjectInfo", "ObjectStore", "StoreConfig", "open_store"]


def open_store(uri: str, config: StoreConfig = _PATIENCE) -> ObjectStore:
    """The store at `uri`: a folder path, `file:///folder`, or `s3://bucket/prefix`.

    S3 takes its endpoint from AWS_ENDPOINT_URL and its credentials from the AWS_* environment. Opening does
    not connect: a wrong bucket or key shows at the first operation. Raises ConfigError for any other address.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _open_folder(uri, uri, config)
    if scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(f"{uri}: not a local folder; write file:///absolute/path, or just the path")
        return _open_folder(uri, unquote(parts.path), config)
    if scheme == "s3":
        bucket, _, prefix = rest.strip("/").partition("/")
        if not bucket:
            raise ConfigError(f"{uri}: no bucket; write s3://bucket/prefix")
        # Imported here: it costs half a second, which the many processes of a local run need not pay.
        from cluster.store_s3 import S3Store

        return S3Store(f"s3://{bucket}/{prefix}".rstrip("/"), config)
    raise ConfigError(f"{uri}: unknown storage scheme {scheme!r}; use a folder path, file:// or s3://")


def _open_folder(uri: str, path: str, config: StoreConfig) -> LocalStore:
    if not path:
        raise ConfigError("the storage address is empty; use a folder path, file:// or s3://")
    folder = Path(path).expanduser().absolute()
    if folder.is_file():
        raise ConfigError(f"{uri}: is a file; a store needs a folder, so choose another path")
    return LocalStore(str(folder), config)
