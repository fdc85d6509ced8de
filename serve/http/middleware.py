"""ASGI middleware: request ID, operator token, body size and time limits.

All checks run before anything is parsed: the middleware reads the body, up to the byte limit of its
route and within a time limit, and passes it on as one message.
"""

import asyncio
import hmac
import os
import re
import uuid
from collections.abc import Callable, Mapping

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, UnauthorizedError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_MIB = 1 << 20
_LARGE = {"/v1/recommend:batch": 8 * _MIB, "/v1/catalog/delta": 32 * _MIB}
_MAX_BYTES = _MIB
"""Maximum body size of all other routes."""
_BODY_S = 30.0
"""Maximum seconds for a client to send a body. Serve has such a limit too, but a header of the
client disables it."""
OPERATOR = frozenset({"/v1/catalog/delta", "/v1/policy:activate"})
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
        client_id = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = client_id if _REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        route = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        try:
            if route in OPERATOR:
                check_token(headers.get(b"authorization", b"").decode("latin-1"), self._token_env)
            async with asyncio.timeout(_BODY_S):
                body = await _read_body(receive, headers, _LARGE.get(route, _MAX_BYTES))
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
    token = (header or "").removeprefix("Bearer ")
    is_bearer = (header or "").startswith("Bearer ")
    # In constant time, and even if the header cannot be valid.
    is_equal = hmac.compare_digest(
        token.encode("utf-8", "replace"), expected.encode("utf-8", "replace")
    )
    if not (expected and is_bearer and is_equal):
        raise UnauthorizedError("send `Authorization: Bearer` with the operator's token")


def error_response(error: ApiError, request: Request) -> JSONResponse:
    """Return an API error as a problem response with its headers."""
    response = JSONResponse(
        problem(error, request.state.id), error.status, media_type="application/problem+json"
    )
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
    return JSONResponse(body, status, media_type="application/problem+json")
