"""Calls of an endpoint as data: the request, when to send it again, and how to read the answer.

Shared by both clients of `serve.client`. Loads neither torch nor Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from orchard.errors import OrchardError
from serve.catalog.schema import CatalogInfo, DeltaRequest, EventsInfo, EventsRequest, ItemInfo
from serve.schema import (
    ActivateRequest,
    PolicyInfo,
    Problem,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)

R = TypeVar("R", bound=BaseModel)
_PROBLEM = "application/problem+json"
_BROKEN = (httpx.ConnectError, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
"""Errors of a connection whose other end has died."""


class ClientError(OrchardError):
    """Error for a request that an endpoint refused, or that it did not answer."""

    def __init__(
        self,
        detail: str,
        *,
        status: int = 0,
        problem: Problem | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """Create the error of a response, or of none if `status` is 0."""
        super().__init__(detail)
        self.status = status
        """HTTP status; 0 without a response."""
        self.problem = problem
        """Body of the response, if it came from the endpoint itself."""
        self.retry_after_s = retry_after_s
        """Seconds after which another attempt makes sense, if the endpoint said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[R]):
    """A request, and the model of its response."""

    path: str
    answer: type[R]
    body: BaseModel | None = None
    """Body of a POST; a GET without one."""
    changes: bool = False
    """Whether it needs the operator's token and must not be sent twice."""

    def request(self, client: httpx.Client | httpx.AsyncClient, token: str | None) -> httpx.Request:
        """Build the HTTP request."""
        if self.body is None:
            return client.build_request("GET", self.path)
        headers = {"content-type": "application/json"}
        if self.changes and token:
            headers["authorization"] = f"Bearer {token}"
        content = self.body.model_dump_json(exclude_unset=True)
        return client.build_request("POST", self.path, content=content, headers=headers)

    def once_more(self, outcome: httpx.Response | Exception) -> bool:
        """Return whether a replica has died under a request that may be sent again."""
        if self.changes:
            return False
        if isinstance(outcome, Exception):
            return isinstance(outcome, _BROKEN)
        return outcome.status_code >= 500 and not _is_problem(outcome)

    def read(self, outcome: httpx.Response | Exception) -> R:
        """Return the answer; raise ClientError if there is none."""
        if isinstance(outcome, Exception):
            raise ClientError(
                f"the endpoint did not answer {self.path} ({type(outcome).__name__}: {outcome}); "
                "is it running, and is the address right?"
            ) from outcome
        if outcome.status_code != 200:
            raise _refusal(outcome)
        try:
            # Fields of a later release are passed over.
            return self.answer.model_validate_json(outcome.content, extra="ignore")
        except ValidationError as error:
            raise ClientError(
                f"the answer to {self.path} is not one of an Orchard endpoint "
                f"({error.errors()[0]['msg']}); is the address right?",
                status=outcome.status_code,
            ) from error


def _is_problem(response: httpx.Response) -> bool:
    """Return whether a response is a problem, which only the endpoint itself sends."""
    return response.headers.get("content-type", "").startswith(_PROBLEM)


def _refusal(response: httpx.Response) -> ClientError:
    """Return the error of a response that is no answer."""
    status, problem = response.status_code, None
    detail = f"{response.url.path} was answered with status {status}"
    if _is_problem(response):
        problem = Problem.model_validate_json(response.content)
        detail = f"{problem.title} ({status}): {problem.detail}"
        for wrong in problem.errors or []:
            detail += f"; {wrong.get('field')}: {wrong.get('detail')}"
    after = response.headers.get("retry-after", "")
    return ClientError(
        detail, status=status, problem=problem,
        retry_after_s=float(after) if after.isdigit() else None,
    )  # fmt: skip


def _valid(model: type[R], fields: dict[str, Any]) -> R:
    """Return a request; raise ClientError if the endpoint would refuse it."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ClientError(f"{where or model.__name__}: {first['msg']}", status=422) from error


def recommend(
    history: Sequence[int] | None, user: str | None, k: int, options: dict[str, Any]
) -> Call[RecommendResponse]:
    """Return the call for recommendations; raise ClientError if it is invalid."""
    given = None if history is None else list(history)
    body = _valid(RecommendRequest, {"history": given, "user": user, "k": k, **options})
    return Call(path="/v1/recommend", answer=RecommendResponse, body=body)


def score(
    history: Sequence[int] | None, items: Sequence[int], user: str | None, options: dict[str, Any]
) -> Call[ScoreResponse]:
    """Return the call for scores; raise ClientError if it is invalid."""
    given = None if history is None else list(history)
    fields = {"history": given, "user": user, "items": list(items), **options}
    return Call(path="/v1/score", answer=ScoreResponse, body=_valid(ScoreRequest, fields))


def item(item_id: int) -> Call[ItemInfo]:
    """Return the call that describes an item."""
    return Call(path=f"/v1/items/{item_id}", answer=ItemInfo)


CATALOG = Call(path="/v1/catalog", answer=CatalogInfo)
POLICY = Call(path="/v1/policy", answer=PolicyInfo)


def change(delta: DeltaRequest) -> Call[CatalogInfo]:
    """Return the call that changes the catalog."""
    return Call(path="/v1/catalog/delta", answer=CatalogInfo, body=delta, changes=True)


def count_events(events: Sequence[tuple[Sequence[int], int]], forget: bool) -> Call[EventsInfo]:
    """Return the call that adds events; raise ClientError if it is invalid."""
    given = [{"history": list(history), "item": item} for history, item in events]
    body = _valid(EventsRequest, {"events": given, "forget": forget})
    return Call(path="/v1/events", answer=EventsInfo, body=body, changes=True)


def activate(version: str, variant: str) -> Call[PolicyInfo]:
    """Return the call that pins a policy version."""
    body = _valid(ActivateRequest, {"version": version, "variant": variant})
    return Call(path="/v1/policy:activate", answer=PolicyInfo, body=body, changes=True)
