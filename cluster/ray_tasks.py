"""A bounded window of Ray tasks, and the Ray session that they need.

Ray's own retries stay off: which failure is worth another attempt is decided here, for exceptions of the
function and for workers that die alike. Ray is imported where it is used: that takes half a second, which
commands that only read a recipe need not pay.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import ConfigError, Hang, MaskClipError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.exceptions import RayError

_OBJECT_STORE_BYTES = 128 << 20
_CANCEL_SECONDS = 3.0
_PROBE_SECONDS = 10.0
_LEAST_BUDGET = 16
_RECOUNT_SECONDS = 5.0
# Ray otherwise sends usage reports, and warns of a change in GPU visibility that no CPU task notices.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Workers are kept while they wait for the next step of a shuffle: starting one costs seconds.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
}

T = TypeVar("T")


@contextmanager
def ray_session(num_cpus: int | None) -> Iterator[None]:
    """Ray for the length of a block: the cluster at RAY_ADDRESS if that is set, else a local one.

    A local one has `num_cpus` cores (None: all of them) and ends with the block. A session that is already
    open is used as it is.

    Raises:
        ConfigError: nothing answers at RAY_ADDRESS.
        Hang: Ray itself failed within the block, not a task: another attempt may pass.
    """
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        with _ray_faults():
            yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _probe(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, RayError, ValueError) as exc:
        where = f"RAY_ADDRESS={address}" if address else "local Ray"
        reason = " ".join(str(exc).split())
        raise ConfigError(
            f"{where}: no session ({reason}); start the cluster, or set or unset RAY_ADDRESS"
        ) from exc
    try:
        with _ray_faults():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _ray_faults() -> Iterator[None]:
    """An exception of Ray that is not one of a task becomes a Hang: an agent or a machine of Ray is gone."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayError as exc:
        if isinstance(exc, RayTaskError):
            raise
        raise _fault(exc) from exc


def _fault(exc: BaseException) -> Hang:
    reason = " ".join(str(exc).split())[:300]
    return Hang(f"Ray failed ({type(exc).__name__}: {reason}); run again, what is done stays done")


def _probe(address: str) -> None:
    """OSError when nothing listens at `host:port`; Ray itself would try for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host, int(port)), _PROBE_SECONDS).close()


def run_bounded(
    fn: Callable[[Any], T],
    items: Iterable[Any],
    *,
    window: int | None,
    retries: int,
    budget: int | None = None,
    label: Callable[[Any], str] | None = None,
    num_cpus: float = 1.0,
) -> Generator[tuple[int, T], None, None]:
    """Run `fn(item)` as Ray tasks over all nodes and yield (index of the item, result) as they complete.

    At most `window` tasks are in flight (None: twice the cores of the cluster, counted again as nodes come
    and go), those done but not yet taken included, and `items` is read only as places become free. A task
    that raises, or whose worker dies, runs again up to `retries` times; then its own exception is raised and
    the others in flight are cancelled, as they are when the caller stops early. A MaskClipError is never run
    again. A worker that keeps dying raises a MaskClipError that names the item by `label`, a node that does a
    Hang, and so does Ray itself when it fails, at once.

    All tasks together may be run again `budget` times plus once for every ten that succeeded (None: as many
    as the window holds, at least 16), so that a cluster on which everything fails now and then ends the job
    and one on which a node is lost now and then does not. Needs a ray_session.
    """
    import ray
    from ray.exceptions import RayError, RaySystemError, RayTaskError

    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    task = ray.remote(num_cpus=num_cpus, max_retries=0, scheduling_strategy="SPREAD")(fn)
    waiting = enumerate(items)
    in_flight: dict[ObjectRef, tuple[int, Any, int]] = {}
    places, counted = window or _places(), time.monotonic()
    rerun = finished = 0
    try:
        while True:
            if window is None and time.monotonic() - counted > _RECOUNT_SECONDS:
                places, counted = _places(), time.monotonic()
            while len(in_flight) < places and (following := next(waiting, None)) is not None:
                index, item = following
                in_flight[task.remote(item)] = (index, item, 1)
            if not in_flight:
                return
            (done,), _ = ray.wait(list(in_flight), num_returns=1, fetch_local=False)
            index, item, attempt = in_flight.pop(done)
            try:
                result = ray.get(done)
            except RayError as exc:
                if isinstance(exc, RaySystemError):
                    raise _fault(exc) from exc
                name = label(item) if label else f"task {index}"
                failure = _failure(exc, name, attempt)
                if attempt > retries or (
                    isinstance(failure, MaskClipError) and isinstance(exc, RayTaskError)
                ):
                    raise failure from None
                rerun += 1
                allowed = (max(_LEAST_BUDGET, places) if budget is None else budget) + finished // 10
                if rerun > allowed:
                    raise MaskClipError(
                        f"{rerun} tasks failed while {finished} succeeded, the last with: "
                        f"{' '.join(str(failure).split())}; mend the cluster and run again"
                    ) from failure
                in_flight[task.remote(item)] = (index, item, attempt + 1)
            else:
                finished += 1
                yield index, result
    finally:
        _cancel(list(in_flight))


def _places() -> int:
    """Twice the cores: a worker that is done finds its next task waiting."""
    import ray

    return max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))


def _failure(exc: RayError, name: str, attempt: int) -> BaseException:
    """The exception of the function itself, or a named one when its worker died."""
    from ray.exceptions import LocalRayletDiedError, NodeDiedError, RayTaskError

    if isinstance(exc, RayTaskError):
        return exc.cause if isinstance(exc.cause, BaseException) else exc
    reason = str(exc).strip().partition("\n")[0]
    if isinstance(exc, LocalRayletDiedError | NodeDiedError):
        return Hang(f"{name}: its node died in attempt {attempt} ({reason}); run again")
    return MaskClipError(f"{name}: its worker process died in attempt {attempt} ({reason})")


def _cancel(refs: list[ObjectRef]) -> None:
    """End these tasks and wait for it, so that nothing writes on after the caller has moved on."""
    import ray
    from ray.exceptions import RayError

    for force in (False, True):
        for ref in refs:
            with suppress(RayError):
                ray.cancel(ref, force=force)
        if refs:
            with suppress(RayError):  # Ray itself may be what failed
                _, refs = ray.wait(refs, num_returns=len(refs), timeout=_CANCEL_SECONDS)
