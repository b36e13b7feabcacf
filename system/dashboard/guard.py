"""Who may ask, and what: the checks that every request passes before anything else sees it."""

import hmac
from http.cookies import SimpleCookie
from ipaddress import ip_address
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_QUERY = 2_000
COOKIE = "maskclip_dashboard"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses what is no plain look at this server.

    - Other methods than GET and HEAD: 405. Queries or paths of more than `MOST_QUERY` bytes: 414. Paths with
      a way up, a backslash or a zero byte: 400.
    - With a `token`: 401 without it (header `Authorization: Bearer`, cookie, or once `?token=`, which sets
      the cookie and goes on without it in the address).
    - Without a token the server is for this machine alone, so the `Host` must be a name of it: a page of the
      web that had its name resolve to 127.0.0.1 is refused with 421.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = self._refusal(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in _HEADERS.items()),
                ]
            await send(message)

        await (answer or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("only GET", 405)
        raw = scope.get("raw_path", b"")
        if len(scope["query_string"]) > MOST_QUERY or len(raw) > MOST_QUERY:
            return PlainTextResponse("the address is too long", 414)
        path = scope["path"]
        if ".." in path.split("/") or "\\" in path or "\0" in path or "//" in path:
            return PlainTextResponse("not a path of this server", 400)
        headers = Headers(scope=scope)
        if self._token is None:
            known = _is_this_machine(headers.get("host", ""))
            return None if known else PlainTextResponse("this dashboard is at 127.0.0.1", 421)
        return self._without_token(scope, headers, self._token)

    def _without_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = next((value for name, value in query if name == "token"), None)
        if given is not None and _same(given, token):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            answer = RedirectResponse(scope["path"] + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", max_age=7 * 86_400)
            return answer
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        cookies = SimpleCookie(headers.get("cookie", ""))
        cookie = cookies[COOKIE].value if COOKIE in cookies else ""
        if _same(bearer, token) or _same(cookie, token):
            return None
        wanted = "401: open the address that the command printed; it holds the token"
        return PlainTextResponse(wanted, 401, {"WWW-Authenticate": "Bearer"})


def is_loopback(host: str) -> bool:
    """Whether nothing outside of this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_this_machine(host: str) -> bool:
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
