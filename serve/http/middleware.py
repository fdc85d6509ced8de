"""ASGI middleware: request ID, operator token, body size and time limits.

All checks run before anything is parsed: the middleware reads the body, up to the byte limit of its
route and within a time limit, and passes it on as one message.
"""

import asyncio
import hmac
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, UnauthorizedError, UnsupportedMediaError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_HEADER = b"x-request-id"
_MIB = 1 << 20
_LARGE = {"/v1/recommend:batch": 8 * _MIB, "/v1/catalog/delta": 32 * _MIB, "/v1/events": 32 * _MIB}
_MAX_BYTES = _MIB
"""Maximum body size of all other routes."""
_BODY_S = 30.0
"""Maximum seconds for a client to send a body. Serve has such a limit too, but a header of the
client disables it."""
OPERATOR = frozenset({"/v1/catalog/delta", "/v1/events", "/v1/policy:activate"})
"""Routes that require the operator token. Their handlers check it again, whatever the path."""


class _Refused(Exception):
    """Raised for a body that is too large."""

    def __init__(self, status: int, title: str, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.fields = (status, title, kind, detail)


class RequestMiddleware:
    """Middleware that sets the request ID, checks the operator token and reads the body."""

    def __init__(
        self, app: ASGIApp, *, token_env: str, refused: Callable[[ApiError], object]
    ) -> None:
        """Wrap `app`.

        Args:
            app: wrapped application.
            token_env: environment variable that contains the operator token.
            refused: called with the error of every request refused for a missing or wrong token.
        """
        self._app, self._token_env, self._refused = app, token_env, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check and forward one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["id"] = request_id
        is_head, is_post = scope["method"] == "HEAD", scope["method"] == "POST"
        if is_head:  # answered as GET, without the body
            scope = {**scope, "method": "GET"}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = _with_id(message["headers"], request_id)
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        route = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        limit = _LARGE.get(route, _MAX_BYTES) if is_post else _MAX_BYTES
        try:
            if route in OPERATOR and is_post:
                check_token(headers.get(b"authorization", b"").decode("latin-1"), self._token_env)
            async with asyncio.timeout(_BODY_S):
                body = await _read_body(receive, headers, limit)
        except UnauthorizedError as error:
            self._refused(error)
            await error_response(error, Request(scope))(scope, receive, send_with_id)
            return
        except _Refused as error:
            await problem_response(*error.fields, Request(scope))(scope, receive, send_with_id)
            return
        except TimeoutError:
            detail = f"send the body within {_BODY_S:.0f} s"
            response = problem_response(
                408, "The body came too late", "too-late", detail, Request(scope)
            )
            await response(scope, receive, send_with_id)
            return

        pending = [body]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send_with_id)


class RequestIdMiddleware:
    """Middleware for Serve's own proxy, which echoes any `x-request-id` and adds a second one.

    It wraps the proxy: a request reaches it with one valid ID, and a response leaves with one.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_id(message["headers"], request_id)}
            await send(message)

        headers = _with_id(scope["headers"], request_id)
        await self._app({**scope, "headers": headers}, receive, send_with_id)


def proxy_middlewares() -> list[Middleware]:
    """Return the middlewares that Serve's proxies load by `RAY_SERVE_HTTP_PROXY_CALLBACK`."""
    return [Middleware(RequestIdMiddleware)]


def request_id_of(scope: Scope) -> str:
    """Return the request ID of the client if it sent one valid ID, else a new one."""
    sent = [value for name, value in scope["headers"] if name.lower() == _HEADER]
    client_id = sent[0].decode("latin-1") if len(set(sent)) == 1 else ""
    return client_id if _REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex


def _with_id(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    """Return the headers with this request ID in place of any other."""
    others = [header for header in headers if header[0].lower() != _HEADER]
    return [*others, (_HEADER, request_id.encode())]


async def _read_body(receive: Receive, headers: Mapping[bytes, bytes], limit: int) -> Message:
    """Return the complete body as one message, or the disconnect message of the client."""
    too_large = _Refused(
        413, "The body is too large", "too-large", f"send at most {limit} bytes"
    )  # fmt: skip
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:  # a chunked body does not declare its length
            raise too_large
        if not message.get("more_body", False):
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}


def check_token(header: str | None, variable: str) -> None:
    """Raise UnauthorizedError unless the header carries the operator's token."""
    expected = os.environ.get(variable, "")
    scheme, _, token = (header or "").partition(" ")
    token, is_bearer = token.strip(" "), scheme.lower() == "bearer"
    # In constant time, and even if the header cannot be valid.
    is_equal = hmac.compare_digest(
        token.encode("utf-8", "replace"), expected.encode("utf-8", "replace")
    )
    if not (expected and is_bearer and is_equal):
        raise UnauthorizedError("send `Authorization: Bearer` with the operator's token")


class ProblemResponse(JSONResponse):
    """Problem in ASCII: a client's text may hold characters that UTF-8 does not have."""

    media_type = "application/problem+json"

    def render(self, content: object) -> bytes:
        """Return the JSON text of the problem."""
        return json.dumps(content).encode("ascii")


def require_json(request: Request) -> None:
    """Raise UnsupportedMediaError unless the body is declared as JSON in UTF-8."""
    sent = request.headers.get("content-type", "")
    kind, _, parameters = sent.partition(";")
    kind = kind.strip().lower()
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]*)", parameters, re.IGNORECASE)
    is_json = kind == "application/json" or re.fullmatch(r"application/[^/\s]+\+json", kind)
    if not is_json or (charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii")):
        raise UnsupportedMediaError(
            "send the body as `content-type: application/json`, in UTF-8; the request has "
            + (f"{sent[:100]!a}" if sent else "none")
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaError(
            f"send the body without `content-encoding`; the request has {encoding[:100]!a}"
        )


def error_response(error: ApiError, request: Request) -> JSONResponse:
    """Return an API error as a problem response with its headers."""
    response = ProblemResponse(problem(error, request.state.id), error.status)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, UnauthorizedError):
        response.headers["www-authenticate"] = "Bearer"
    return response


def problem(error: ApiError, request_id: str) -> dict[str, object]:
    """Return the problem body of an API error (RFC 9457)."""
    return {
        "type": f"urn:orchard:problem:{error.kind}",
        "title": error.title,
        "status": error.status,
        "detail": str(error),
        "instance": request_id,
    }


def problem_response(
    status: int, title: str, kind: str, detail: str, request: Request, **fields: object
) -> JSONResponse:
    """Return a problem response for an error that is not an ApiError."""
    body = {
        "type": f"urn:orchard:problem:{kind}", "title": title, "status": status,
        "detail": detail, "instance": request.state.id, **fields,
    }  # fmt: skip
    return ProblemResponse(body, status)
