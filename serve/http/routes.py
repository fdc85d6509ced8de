"""The HTTP face of a service: routes, checks, problems. Knows no Ray; `serve.app` adds that.

Every answer carries `x-request-id`. Errors are problems (RFC 9457) naming neither paths nor code.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from serve.errors import (
    ApiError,
    ConflictError,
    OverloadedError,
    UnauthorisedError,
    UnavailableError,
    UnknownNameError,
    UnprocessableError,
)
from serve.http.info import catalog_info, item_info, policy_info
from serve.http.middleware import (
    RequestMiddleware,
    check_token,
    error_response,
    problem,
    problem_response,
)
from serve.schema import (
    ActivateRequest,
    BatchRequest,
    CatalogInfo,
    DeltaRequest,
    ItemInfo,
    PolicyInfo,
    Problem,
    RecommendRequest,
    RecommendResponse,
)
from serve.service import Service

_log = logging.getLogger("orchard.serve")
_EXPLORER = Path(__file__).with_name("explorer.html")
_POLICY = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_CLOSED_REQUEST = 499
"""What proxies log where the client has gone; nobody reads the answer."""
T = TypeVar("T")
_KINDS = (
    ApiError, UnauthorisedError, UnknownNameError, ConflictError, UnprocessableError,
    OverloadedError, UnavailableError,
)  # fmt: skip
PROBLEMS: dict[int | str, dict[str, Any]] = {
    408: {"model": Problem, "description": "The body came too late"},
    413: {"model": Problem, "description": "The body is too large"},
    **{kind.status: {"model": Problem, "description": kind.title} for kind in _KINDS},
}


def create_app(service: Service) -> FastAPI:
    """The application; its lifespan starts and closes the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title="Orchard", summary="Generative recommendation.", version="1", lifespan=lifespan,
        responses=PROBLEMS, docs_url="/docs", redoc_url=None,
    )  # fmt: skip

    def count(error: ApiError) -> None:
        service.meters.count("orchard_serve_refused", kind=error.kind)

    app.add_middleware(RequestMiddleware, token_env=service.config.token_env, refused=count)
    _add_problems(app, service)
    _add_reading(app, service)
    _add_writing(app, service)
    _add_explorer(app, service)
    return app


def _add_reading(app: FastAPI, service: Service) -> None:
    """Routes that change nothing."""

    @app.post("/v1/recommend", response_model=RecommendResponse, tags=["recommend"])
    async def recommend(request: Request, body: RecommendRequest) -> Response:
        """Items for one history, best first."""
        work = service.recommend(body, request.state.id)
        answer = await _unless_gone(request, work)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.post("/v1/recommend:batch", response_model=None, tags=["recommend"])
    async def recommend_batch(request: Request, body: BatchRequest) -> Response:
        """Several requests at once; each is answered or refused by itself."""

        async def one(place: int, asked: RecommendRequest) -> str:
            name = f"{request.state.id}.{place}"
            try:
                return (await service.recommend(asked, name)).model_dump_json()
            except ApiError as refusal:
                service.meters.count("orchard_serve_refused", kind=refusal.kind)
                return json.dumps(problem(refusal, name))

        work = asyncio.gather(*(one(i, asked) for i, asked in enumerate(body.requests)))
        answers = await _unless_gone(request, work)
        return Response(f'{{"responses":[{",".join(answers)}]}}', media_type="application/json")

    @app.get("/v1/items/{item_id}", tags=["catalogue"])
    async def item(item_id: int) -> ItemInfo:
        """One item, and which filters let it pass."""
        # A filter that nobody has asked for yet takes a look at every item.
        return await asyncio.to_thread(item_info, service.catalog_store.current, item_id)

    @app.get("/v1/catalog", tags=["catalogue"])
    async def catalog() -> CatalogInfo:
        """The catalog that answers now."""
        return catalog_info(service, service.catalog_store.current)

    @app.get("/v1/policy", tags=["policy"])
    async def policy() -> PolicyInfo:
        """The policies that answer now."""
        return policy_info(service)

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["health"])
    async def readyz() -> dict[str, str]:
        """Policy and catalog are loaded and warm."""
        if not service.ready:
            raise UnavailableError("the policy is still being loaded; try again in a moment")
        return {"status": "ready"}


def _add_explorer(app: FastAPI, service: Service) -> None:
    """The page, and what it alone asks for."""

    @app.get("/", include_in_schema=False)
    async def explorer() -> HTMLResponse:
        """A page to look at recommendations."""
        text = await asyncio.to_thread(_EXPLORER.read_text)
        return HTMLResponse(text, headers={"content-security-policy": _POLICY})

    @app.get("/v1/explore", include_in_schema=False)
    async def some_items() -> dict[str, list[int]]:
        """A few items, to begin with."""
        rows = np.flatnonzero(service.catalog_store.current.snapshot.live)
        chosen = np.random.default_rng().choice(rows, min(5, len(rows)), replace=False)
        return {"item_ids": service.catalog_store.current.catalog.item_id[chosen].tolist()}

    @app.post("/v1/explore/{variant}", include_in_schema=False)
    async def explore(request: Request, variant: str, body: RecommendRequest) -> Response:
        """As `recommend`, from the variant that is named, past cache and log."""
        answer = await _unless_gone(request, service.explore(body, variant))
        return Response(answer.model_dump_json(), media_type="application/json")


def _add_writing(app: FastAPI, service: Service) -> None:
    """Routes of the operator, behind the token."""

    @app.post("/v1/catalog/delta", tags=["catalogue"])
    async def delta(request: Request, body: Annotated[DeltaRequest, Body()]) -> CatalogInfo:
        """Add, remove and change items, or go back to an earlier version."""
        check_token(request.headers.get("authorization"), service.config.token_env)
        catalog_version = await service.change(body)
        return catalog_info(service, catalog_version).model_copy(update={"dry_run": body.dry_run})

    @app.post("/v1/policy:activate", tags=["policy"])
    async def activate(request: Request, body: Annotated[ActivateRequest, Body()]) -> PolicyInfo:
        """Pin a policy, or follow training again."""
        check_token(request.headers.get("authorization"), service.config.token_env)
        await service.activate(body)
        return policy_info(service)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result, unless the client hangs up first, which cancels the work."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(_CLOSED_REQUEST, "the client has gone")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_problems(app: FastAPI, service: Service) -> None:
    """Every error as a problem."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        service.meters.count("orchard_serve_refused", kind=error.kind)
        return error_response(error, request)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = error.errors()
        fields = [
            {"field": ".".join(str(part) for part in one["loc"]), "detail": one["msg"]}
            for one in wrong[:20]
        ]
        return problem_response(
            422, "The request does not fit", "malformed",
            f"{len(wrong)} fields are wrong; see errors", request, errors=fields,
        )  # fmt: skip

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        return problem_response(
            error.status_code, str(error.detail), "http", str(error.detail), request
        )

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        _log.error("request %s failed", request.state.id, exc_info=error)
        response = problem_response(
            500, "An internal error", "internal",
            "the request could not be answered; its instance is in the log", request,
        )  # fmt: skip
        response.headers["x-request-id"] = request.state.id  # the middleware is behind us
        return response
