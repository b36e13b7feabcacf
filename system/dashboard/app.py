"""The web application: a page of static files, and the answers that it asks for."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from cluster.errors import MaskClipError, ObjectNotFound
from system.dashboard import views
from system.dashboard.follow import Follower, Runs
from system.dashboard.guard import Guard
from system.dashboard.pictures import last_evaluation

STATIC = Path(__file__).parent / "static"
MOST_NAMES = 40
MOST_STREAMS = 64
_LOOK_SECONDS = 0.5
_READING_SECONDS = 2.0
"""Between two changes while a long log is read for the first time: looking at it slows the reading."""
_STILL_SECONDS = 15.0
_FURTHEST = 1 << 53


def make_app(runs: Runs, token: str | None) -> Starlette:
    """`token` None: for this machine alone."""
    answers: dict[str, Callable[[Request, Runs], Any]] = {
        "runs": lambda request, runs: runs.names(),
        "overview": lambda request, runs: views.overview(_follower(request, runs)),
        "curves": _curves,
        "ranks": lambda request, runs: views.rank_grid(_follower(request, runs)),
        "events": lambda request, runs: views.events(
            _follower(request, runs), request.query_params.get("name")
        ),
        "evaluation": lambda request, runs: last_evaluation(_follower(request, runs).run),
    }
    routes = [
        Route("/", lambda request: FileResponse(STATIC / "index.html")),
        *(Route(f"/api/{name}", _endpoint(answer, runs)) for name, answer in answers.items()),
        Route("/api/stream", _Streams(runs)),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    middleware = [
        Middleware(Guard, token=token),
        Middleware(GZipMiddleware, minimum_size=2000, compresslevel=1),
    ]
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={ObjectNotFound: _not_found, MaskClipError: _unavailable},
    )


def _endpoint(answer: Callable[[Request, Runs], Any], runs: Runs) -> Callable[[Request], Response]:
    """Not a coroutine: Starlette runs it in a thread, so that a slow store holds up no other request."""

    def endpoint(request: Request) -> Response:
        found = answer(request, runs)
        try:
            text = json.dumps(found, allow_nan=False, separators=(",", ":"))
        except ValueError:  # rare, and looking for it takes longer than all the rest
            text = json.dumps(views.clean(found), allow_nan=False, separators=(",", ":"))
        return Response(text, media_type="application/json")

    return endpoint


def _follower(request: Request, runs: Runs) -> Follower:
    names = runs.names()
    name = request.query_params.get("run")
    if name is None:
        if not names:
            raise HTTPException(404, "no run here")
        name = names[-1]
    return runs.follower(name)


def _curves(request: Request, runs: Runs) -> dict[str, Any]:
    names = [name for name in request.query_params.get("scalars", "").split(",") if name]
    if not names or len(names) > MOST_NAMES:
        raise HTTPException(400, f"scalars: 1 to {MOST_NAMES} names, with commas between")
    first, last = _whole(request, "from", 0), _whole(request, "to", _FURTHEST)
    points = max(10, _whole(request, "points", 800))
    return views.curves(_follower(request, runs), names, first, last, points)


def _whole(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise HTTPException(400, f"{name}: a whole number from 0 on")
    return int(text)


class _Streams:
    """Server-sent events: one line whenever a run has something new."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._open = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        if self._open >= MOST_STREAMS:
            raise HTTPException(503, "too many pages are open")
        follower = await asyncio.to_thread(_follower, request, self._runs)
        answer = StreamingResponse(self._changes(follower), media_type="text/event-stream")
        self._open += 1
        try:
            await answer(scope, receive, send)
        finally:
            self._open -= 1

    async def _changes(self, follower: Follower) -> AsyncIterator[str]:
        sent: tuple[int, float, str | None] | None = None
        still = 0.0
        while True:
            await asyncio.to_thread(follower.ask)
            state = follower.index.version, follower.done, follower.problem
            if state != sent:
                sent, still = state, 0.0
                version, done, problem = state
                yield f"data: {json.dumps({'version': version, 'read': done, 'problem': problem})}\n\n"
            elif still >= _STILL_SECONDS:
                still = 0.0
                yield ": still here\n\n"
            pause = _LOOK_SECONDS if follower.done == 1.0 else _READING_SECONDS
            await asyncio.sleep(pause)
            still += pause


def _not_found(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 404)


def _unavailable(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 503)
