"""What is let in: a request's name, the operator's token, and a body within its bounds.

All of it before anything is parsed: a body is read here, at most as many bytes as its route takes
and for a bounded time, and handed on whole.
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

from serve.errors import ApiError, UnauthorisedError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_MIB = 1 << 20
_LARGE = {"/v1/recommend:batch": 8 * _MIB, "/v1/catalog/delta": 32 * _MIB}
_MOST_BYTES = _MIB
"""Of all other bodies."""
_BODY_S = 30.0
"""Longest that a client may take to send a body. Serve has such a bound too, which a header of the
client's switches off."""
OPERATOR = frozenset({"/v1/catalog/delta", "/v1/policy:activate"})
"""Routes behind the token. They ask for it again themselves, whatever path led there."""


class _Refused(Exception):
    """A body that is not read to its end."""

    def __init__(self, status: int, title: str, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.fields = (status, title, kind, detail)


class RequestMiddleware:
    """Takes the caller's `x-request-id` or makes one, asks for the token, reads the body."""

    def __init__(
        self, app: ASGIApp, *, token_env: str, refused: Callable[[ApiError], object]
    ) -> None:
        """Around `app`; the operator's token is in the environment variable `token_env`.

        `refused` is told who was sent away for want of it.
        """
        self._app, self._token_env, self._refused = app, token_env, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        route = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        try:
            if route in OPERATOR:
                check_token(headers.get(b"authorization", b"").decode("latin-1"), self._token_env)
            async with asyncio.timeout(_BODY_S):
                first = await _read(receive, headers, _LARGE.get(route, _MOST_BYTES))
        except UnauthorisedError as error:
            self._refused(error)
            await error_response(error, Request(scope))(scope, receive, named)
            return
        except _Refused as error:
            await problem_response(*error.fields, Request(scope))(scope, receive, named)
            return
        except TimeoutError:
            detail = f"send the body within {_BODY_S:.0f} s"
            late = problem_response(
                408, "The body came too late", "too-late", detail, Request(scope)
            )
            await late(scope, receive, named)
            return

        waiting = [first]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, named)


async def _read(receive: Receive, headers: Mapping[bytes, bytes], most: int) -> Message:
    """The whole body as one message, or that the client has gone."""
    too_large = _Refused(
        413, "The body is too large", "too-large", f"send at most {most} bytes"
    )  # fmt: skip
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > most:
        raise too_large
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:  # a chunked body says nothing of its length beforehand
            raise too_large
        if not message.get("more_body", False):
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}


def check_token(header: str | None, variable: str) -> None:
    """Raise UnauthorisedError unless the header carries the operator's token."""
    wanted = os.environ.get(variable, "")
    given = (header or "").removeprefix("Bearer ")
    bearer = (header or "").startswith("Bearer ")
    # Compared in constant time, and compared even where it cannot hold.
    same = hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode("utf-8", "replace"))
    if not (wanted and bearer and same):
        raise UnauthorisedError("send `Authorization: Bearer` with the operator's token")


def error_response(error: ApiError, request: Request) -> JSONResponse:
    """A refusal as a problem."""
    response = JSONResponse(
        problem(error, request.state.id), error.status, media_type="application/problem+json"
    )
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, UnauthorisedError):
        response.headers["www-authenticate"] = "Bearer"
    return response


def problem(error: ApiError, request_id: str) -> dict[str, object]:
    """The body of a refusal (RFC 9457)."""
    return {
        "type": f"urn:orchard:problem:{error.kind}",
        "title": error.title,
        "status": error.status,
        "detail": str(error),
        "instance": request_id,
    }


def problem_response(
    status: int, title: str, kind: str, detail: str, request: Request, **more: object
) -> JSONResponse:
    """Any other problem."""
    body = {
        "type": f"urn:orchard:problem:{kind}", "title": title, "status": status,
        "detail": detail, "instance": request.state.id, **more,
    }  # fmt: skip
    return JSONResponse(body, status, media_type="application/problem+json")
