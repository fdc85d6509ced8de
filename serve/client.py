"""Clients of an endpoint, blocking and asynchronous; neither loads torch or Ray.

    with orchard.Client("http://127.0.0.1:8000") as client:
        answer = client.recommend([3, 17, 5], k=10, exclude_seen=True)
        [item.item_id for item in answer.items]

A request that only reads is sent once more if the replica that had it died: the connection broke,
or a proxy answered in its place. Requests that change something are sent once.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

import httpx
from pydantic import BaseModel

from serve import calls
from serve.calls import Call
from serve.catalog.schema import CatalogInfo, DeltaRequest, EventsInfo, ItemInfo
from serve.schema import PolicyInfo, RecommendResponse, ScoreResponse

R = TypeVar("R", bound=BaseModel)


class Client:
    """Blocking client of one endpoint, which keeps its connections. Thread-safe."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Create a client; it connects with the first request.

        Args:
            url: address of the endpoint, with the route of the application if it has one.
            token: operator's token, for requests that change something.
            timeout_s: seconds to wait for each answer.
            transport: transport of httpx, such as one with certificates of one's own.
        """
        self._http = httpx.Client(base_url=url, timeout=timeout_s, transport=transport)
        self._token = token

    def recommend(
        self,
        history: Sequence[int] | None = None,
        *,
        user: str | None = None,
        k: int = 10,
        **options: Any,
    ) -> RecommendResponse:
        """Return the next items after a history, or that of a user, best first.

        `options` are the other fields of `serve.schema.RecommendRequest`.

        Raises:
            ClientError: the endpoint refused the request, or did not answer.
        """
        return self._send(calls.recommend(history, user, k, options))

    def score(
        self,
        history: Sequence[int] | None,
        items: Sequence[int],
        *,
        user: str | None = None,
        **options: Any,
    ) -> ScoreResponse:
        """Return the log-probability of given items; raises as `recommend`.

        `options` are the other fields of `serve.schema.ScoreRequest`.
        """
        return self._send(calls.score(history, items, user, options))

    def item(self, item_id: int) -> ItemInfo:
        """Describe an item of the catalog; raises as `recommend`."""
        return self._send(calls.item(item_id))

    def catalog(self) -> CatalogInfo:
        """Describe the catalog; raises as `recommend`."""
        return self._send(calls.CATALOG)

    def policy(self) -> PolicyInfo:
        """Describe the served policies; raises as `recommend`."""
        return self._send(calls.POLICY)

    def change_catalog(self, delta: DeltaRequest) -> CatalogInfo:
        """Change the catalog; raises as `recommend`. Needs the token."""
        return self._send(calls.change(delta))

    def count_events(
        self, events: Sequence[tuple[Sequence[int], int]], *, forget: bool = False
    ) -> EventsInfo:
        """Add what was bought after what; raises as `recommend`. Needs the token.

        Args:
            events: histories, oldest item first, each with the item that was bought after it.
            forget: whether to forget all earlier events first.
        """
        return self._send(calls.count_events(events, forget))

    def activate(self, version: str, variant: str = "main") -> PolicyInfo:
        """Pin a version, or follow training by `latest`; raises as `recommend`. Needs the token."""
        return self._send(calls.activate(version, variant))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        self.close()
        return False

    def _send(self, call: Call[R]) -> R:
        """Send a request, at most twice, and return its answer."""
        outcome = self._try(call)
        return call.read(self._try(call) if call.once_more(outcome) else outcome)

    def _try(self, call: Call[R]) -> httpx.Response | Exception:
        """Send a request once; return the response, or why there is none."""
        try:
            return self._http.send(call.request(self._http, self._token))
        except httpx.TransportError as error:
            return error


class AsyncClient:
    """Asynchronous client of one endpoint, with the methods of `Client`."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Create a client; see `Client`."""
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout_s, transport=transport)
        self._token = token

    async def recommend(
        self,
        history: Sequence[int] | None = None,
        *,
        user: str | None = None,
        k: int = 10,
        **options: Any,
    ) -> RecommendResponse:
        """Return the next items after a history; see `Client.recommend`."""
        return await self._send(calls.recommend(history, user, k, options))

    async def score(
        self,
        history: Sequence[int] | None,
        items: Sequence[int],
        *,
        user: str | None = None,
        **options: Any,
    ) -> ScoreResponse:
        """Return the log-probability of given items; see `Client.score`."""
        return await self._send(calls.score(history, items, user, options))

    async def item(self, item_id: int) -> ItemInfo:
        """Describe an item of the catalog; see `Client.item`."""
        return await self._send(calls.item(item_id))

    async def catalog(self) -> CatalogInfo:
        """Describe the catalog; see `Client.catalog`."""
        return await self._send(calls.CATALOG)

    async def policy(self) -> PolicyInfo:
        """Describe the served policies; see `Client.policy`."""
        return await self._send(calls.POLICY)

    async def change_catalog(self, delta: DeltaRequest) -> CatalogInfo:
        """Change the catalog; see `Client.change_catalog`."""
        return await self._send(calls.change(delta))

    async def count_events(
        self, events: Sequence[tuple[Sequence[int], int]], *, forget: bool = False
    ) -> EventsInfo:
        """Add what was bought after what; see `Client.count_events`."""
        return await self._send(calls.count_events(events, forget))

    async def activate(self, version: str, variant: str = "main") -> PolicyInfo:
        """Pin a version, or follow training; see `Client.activate`."""
        return await self._send(calls.activate(version, variant))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        await self.close()
        return False

    async def _send(self, call: Call[R]) -> R:
        """Send a request, at most twice, and return its answer."""
        outcome = await self._try(call)
        return call.read(await self._try(call) if call.once_more(outcome) else outcome)

    async def _try(self, call: Call[R]) -> httpx.Response | Exception:
        """Send a request once; return the response, or why there is none."""
        try:
            return await self._http.send(call.request(self._http, self._token))
        except httpx.TransportError as error:
            return error
