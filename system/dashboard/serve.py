"""The server of the dashboard, from its settings to its end."""

import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from cluster.errors import ConfigError
from cluster.store import open_store
from system.dashboard.app import make_app
from system.dashboard.follow import Runs
from system.dashboard.guard import is_loopback

_SHORTEST_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class DashboardConfig:
    host: str = "127.0.0.1"
    """Address to listen at. Any other than one of this machine alone (0.0.0.0 is all) wants a token."""
    port: int = 8080
    """0: any free one."""
    token: str | None = None
    """Secret that every request must bring; without one a fresh one is made where it is wanted."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"{self.port} is no port: set port to 0 to 65535")
        if self.token is not None and len(self.token) < _SHORTEST_TOKEN:
            raise ValueError(f"the token can be guessed: set token to {_SHORTEST_TOKEN} characters or more")


def serve(uri: str, config: DashboardConfig, announce: Callable[[str], None]) -> None:
    """Serve the runs at `uri` until SIGINT or SIGTERM. `announce` gets the address once it can be opened.

    Raises:
        ConfigError: the address cannot be listened at.
        ObjectNotFound, StorageUnavailable: as the store at `uri`.
    """
    runs = Runs(open_store(uri))
    if not runs.names():
        raise ConfigError(f"{uri}: no run here (no attempts, no events); correct the URI")
    token = config.token
    if token is None and not is_loopback(config.host):
        token = secrets.token_urlsafe(24)
    listener = _listen(config)
    port = listener.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    announce(f"http://{host}:{port}/" + (f"?token={token}" if token else ""))
    settings = uvicorn.Config(
        make_app(runs, token),
        log_level="warning",
        access_log=False,  # a token may stand in the address
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=16_384,
        server_header=False,
    )
    try:
        uvicorn.Server(settings).run([listener])
    finally:
        runs.close()
        listener.close()


def _listen(config: DashboardConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{config.host}:{config.port}: cannot be listened at ({error.strerror}); change host or port"
        ) from None
