"""FastAPI application of a service: routes and error handlers, without Ray (see `serve.app`).

Every response carries `x-request-id`. Errors are problems (RFC 9457) without file paths or code.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Body, Depends, FastAPI, Request, Response, status
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BeforeValidator
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve.catalog.schema import (
    CatalogInfo,
    DeltaRequest,
    EventsInfo,
    EventsRequest,
    ItemInfo,
)
from serve.errors import (
    ApiError,
    ConflictError,
    OverloadedError,
    UnauthorizedError,
    UnavailableError,
    UnknownNameError,
    UnprocessableError,
    UnsupportedMediaError,
)
from serve.http.info import catalog_info, item_info, policy_info
from serve.http.middleware import (
    RequestMiddleware,
    check_token,
    error_response,
    problem,
    problem_response,
    require_json,
)
from serve.schema import (
    ActivateRequest,
    BatchRequest,
    PolicyInfo,
    Problem,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)
from serve.service import Service

_log = logging.getLogger("orchard.serve")
_EXPLORER = Path(__file__).with_name("explorer.html")
_DOCS = Path(__file__).with_name("docs.html")
_JSON = [Depends(require_json)]
"""Dependencies of every route with a body."""
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
_CLOSED_REQUEST = 499
"""Status that proxies log for a client that disconnected; no client receives it."""
T = TypeVar("T")


def _check_digits(text: str) -> str:
    """Refuse what Python reads as an integer besides its digits, such as 1_0 or a line break."""
    if not re.fullmatch(r"0|-?[1-9][0-9]{0,40}", text):
        raise ValueError("an item id is a whole number, written in digits")
    return text


_ItemIdInPath = Annotated[int, BeforeValidator(_check_digits)]
_ERRORS = (
    ApiError, UnauthorizedError, UnknownNameError, ConflictError, UnprocessableError,
    OverloadedError, UnavailableError, UnsupportedMediaError,
)  # fmt: skip
PROBLEMS: dict[int | str, dict[str, Any]] = {
    408: {"model": Problem, "description": "The body came too late"},
    413: {"model": Problem, "description": "The body is too large"},
    **{error.status: {"model": Problem, "description": error.title} for error in _ERRORS},
}


def create_app(service: Service) -> FastAPI:
    """Create the application, whose lifespan starts and closes the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title="Orchard", summary="Generative recommendation.", version="1", lifespan=lifespan,
        responses=PROBLEMS, docs_url=None, redoc_url=None,
    )  # fmt: skip

    def count_refused(error: ApiError) -> None:
        service.metrics.count("orchard_serve_refused", kind=error.kind)

    app.add_middleware(RequestMiddleware, token_env=service.config.token_env, refused=count_refused)
    _add_error_handlers(app, service)
    _add_docs_route(app)
    _add_read_routes(app, service)
    _add_operator_routes(app, service)
    _add_explorer_routes(app, service)
    return app


def _add_read_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that change nothing."""

    @app.post(
        "/v1/recommend", response_model=RecommendResponse, tags=["recommend"], dependencies=_JSON
    )
    async def recommend(request: Request, body: RecommendRequest) -> Response:
        """Recommend items for one history or user, best first."""
        work = service.recommend(body, request.state.id)
        answer = await _cancel_on_disconnect(request, work)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.post("/v1/recommend:batch", response_model=None, tags=["recommend"], dependencies=_JSON)
    async def recommend_batch(request: Request, body: BatchRequest) -> Response:
        """Answer several requests at once; each succeeds or fails independently."""

        async def answer_one(index: int, part: RecommendRequest) -> str:
            request_id = f"{request.state.id}.{index}"
            try:
                return (await service.recommend(part, request_id)).model_dump_json()
            except ApiError as error:
                service.metrics.count("orchard_serve_refused", kind=error.kind)
                return json.dumps(problem(error, request_id))

        work = asyncio.gather(*(answer_one(i, part) for i, part in enumerate(body.requests)))
        answers = await _cancel_on_disconnect(request, work)
        return Response(f'{{"responses":[{",".join(answers)}]}}', media_type="application/json")

    @app.post("/v1/score", response_model=ScoreResponse, tags=["recommend"], dependencies=_JSON)
    async def score(request: Request, body: ScoreRequest) -> Response:
        """Score given items after one history or user, and rank them if wanted."""
        answer = await _cancel_on_disconnect(request, service.score(body))
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/v1/items/{item_id}", tags=["catalogue"])
    async def item(item_id: _ItemIdInPath) -> ItemInfo:
        """Describe one item and the filters that it passes."""
        # In a thread: a filter that is not cached yet scans the whole catalog.
        return await asyncio.to_thread(item_info, service.catalog_store.current, item_id)

    @app.get("/v1/catalog", tags=["catalogue"])
    async def catalog() -> CatalogInfo:
        """Describe the current catalog version."""
        return catalog_info(service, service.catalog_store.current)

    @app.get("/v1/policy", tags=["policy"])
    async def policy() -> PolicyInfo:
        """Describe the served policies."""
        return policy_info(service)

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """Report that the process is alive."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["health"])
    async def readyz() -> dict[str, str]:
        """Report whether policy and catalog are loaded and warmed up."""
        if not service.ready:
            raise UnavailableError("the policy is still being loaded; try again in a moment")
        if service.failing:
            raise UnavailableError("the policy cannot search; its last searches all failed")
        return {"status": "ready"}


def _add_docs_route(app: FastAPI) -> None:
    """Add the page that shows the OpenAPI document, without files from elsewhere."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """Return the page."""
        text = await asyncio.to_thread(_DOCS.read_text)
        return HTMLResponse(text, headers={"content-security-policy": _CONTENT_SECURITY_POLICY})


def _add_explorer_routes(app: FastAPI, service: Service) -> None:
    """Add the explorer page and its private routes."""

    @app.get("/", include_in_schema=False)
    async def explorer() -> HTMLResponse:
        """Return the explorer page."""
        text = await asyncio.to_thread(_EXPLORER.read_text)
        return HTMLResponse(text, headers={"content-security-policy": _CONTENT_SECURITY_POLICY})

    @app.get("/v1/explore", include_in_schema=False)
    async def some_items() -> dict[str, list[int]]:
        """Return a few random items as an initial history."""
        rows = np.flatnonzero(service.catalog_store.current.snapshot.live)
        chosen = np.random.default_rng().choice(rows, min(5, len(rows)), replace=False)
        return {"item_ids": service.catalog_store.current.catalog.item_id[chosen].tolist()}

    @app.post("/v1/explore/{variant}", include_in_schema=False, dependencies=_JSON)
    async def explore(request: Request, variant: str, body: RecommendRequest) -> Response:
        """Recommend with a given variant, without cache or exposure log."""
        answer = await _cancel_on_disconnect(request, service.explore(body, variant))
        return Response(answer.model_dump_json(), media_type="application/json")


def _add_operator_routes(app: FastAPI, service: Service) -> None:
    """Add the operator routes, which require the token."""

    @app.post("/v1/catalog/delta", tags=["catalogue"], dependencies=_JSON)
    async def delta(request: Request, body: Annotated[DeltaRequest, Body()]) -> CatalogInfo:
        """Add, remove and update items, or roll back to an earlier version.

        The tokenizer bundle of the policy assigns semantic IDs to new items without `sid`.
        """
        check_token(request.headers.get("authorization"), service.config.token_env)
        catalog_version, assigned = await service.change(body)
        changes = {"dry_run": body.dry_run, "assigned": assigned}
        return catalog_info(service, catalog_version).model_copy(update=changes)

    @app.post("/v1/events", tags=["policy"], dependencies=_JSON)
    async def events(request: Request, body: Annotated[EventsRequest, Body()]) -> EventsInfo:
        """Add what was bought after what to the counts of the guide, or forget earlier events."""
        check_token(request.headers.get("authorization"), service.config.token_env)
        return await service.count_events(body)

    @app.post("/v1/policy:activate", tags=["policy"], dependencies=_JSON)
    async def activate(request: Request, body: Annotated[ActivateRequest, Body()]) -> PolicyInfo:
        """Pin a policy version, or follow training again."""
        check_token(request.headers.get("authorization"), service.config.token_env)
        await service.activate(body)
        return policy_info(service)


async def _cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await the work; cancel it and raise HTTPException if the client disconnects first."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(_CLOSED_REQUEST, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Return once the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def allowed_methods(app: FastAPI, request: Request) -> list[str]:
    """Return the methods that the path of a request takes."""
    methods = set[str]()
    for route in app.routes:
        found, _ = route.matches(request.scope)
        if found is not Match.NONE:
            methods |= set(getattr(route, "methods", None) or ())
    return sorted(methods | ({"HEAD"} if "GET" in methods else set[str]()))


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    """Add handlers that return every error as a problem."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        service.metrics.count("orchard_serve_refused", kind=error.kind)
        return error_response(error, request)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        failures = error.errors()
        fields = [
            {"field": ".".join(str(part) for part in failure["loc"]), "detail": failure["msg"]}
            for failure in failures[:20]
        ]
        return problem_response(
            422, "The request does not fit", "malformed",
            f"{len(failures)} fields are wrong; see errors", request, errors=fields,
        )  # fmt: skip

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        headers, detail = dict(error.headers or {}), str(error.detail)
        if error.status_code == status.HTTP_405_METHOD_NOT_ALLOWED:
            headers["allow"] = ", ".join(allowed_methods(app, request))
            detail = f"send {headers['allow']} to this path"
        response = problem_response(error.status_code, str(error.detail), "http", detail, request)
        response.headers.update(headers)
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        _log.error("request %s failed", request.state.id, exc_info=error)
        response = problem_response(
            500, "An internal error", "internal",
            "the request could not be answered; its instance is in the log", request,
        )  # fmt: skip
        response.headers["x-request-id"] = request.state.id  # outside the middleware
        return response
