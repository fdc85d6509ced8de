"""Fuzzing of the endpoint: no 5xx, no illegal item, no file path or traceback in a response."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.settings import FilterConfig, ServeConfig
from orchard.testing import TinySetup
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics
from serve.schema import RecommendResponse
from serve.testing import export_policy

FILTERS = {"cheap": {i for i in range(40) if i % 7 < 3}, "stocked": set(range(0, 40, 2))}
PATHS = (
    "/v1/recommend", "/v1/recommend:batch", "/v1/score", "/v1/catalog/delta", "/v1/events",
    "/v1/policy:activate",
)  # fmt: skip


class Served:
    """Running endpoint with a synchronous client."""

    def __init__(self, folder: Path, directory: Path) -> None:
        self.metrics, self.loop = InMemoryMetrics(), asyncio.new_event_loop()
        config = ServeConfig(
            attributes=directory / "attributes.parquet",
            popularity=directory / "popularity.parquet",
            filters={
                "cheap": FilterConfig(column="price", op="<", value=3),
                "stocked": FilterConfig(column="stock"),
            },
            poll_interval_s=3600.0,
            state=directory / "state",
        )
        app = create_app(open_service(folder, config, self.metrics))
        self._lifespan = app.router.lifespan_context(app)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://shop",
        )
        self.loop.run_until_complete(self._lifespan.__aenter__())

    def send(self, path: str, content: bytes, **headers: str) -> httpx.Response:
        response = self.loop.run_until_complete(
            self.client.post(
                path, content=content, headers={"content-type": "application/json"} | headers
            )
        )
        assert response.status_code < 500, (path, content, response.text)
        for leak in ("Traceback", ".py", "site-packages", str(Path.home()), "/tmp"):
            assert leak not in response.text or leak in content.decode("utf-8", "replace")
        if response.status_code >= 400:
            assert response.headers["content-type"] == "application/problem+json"
            problem = response.json()
            assert problem["status"] == response.status_code
            assert problem["instance"] == response.headers["x-request-id"]
        return response

    def close(self) -> None:
        self.loop.run_until_complete(self._lifespan.__aexit__(None, None, None))
        self.loop.run_until_complete(self.client.aclose())
        self.loop.close()


@pytest.fixture(scope="module")
def served(shop_world: TinySetup, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("fuzz")
    folder = export_policy(shop_world, directory / "policy", step=3)
    ids = np.arange(40)
    table = pa.table({"item_id": ids, "price": ids % 7, "stock": ids % 2 == 0})
    pq.write_table(table, directory / "attributes.parquet")
    pq.write_table(pa.table({"item_id": ids, "count": 40 - ids}), directory / "popularity.parquet")
    endpoint = Served(folder, directory)
    yield endpoint
    endpoint.close()
    assert endpoint.metrics.total("orchard_serve_illegal") == 0


item = st.integers(-3, 60) | st.integers(-(2**63), 2**63 - 1)
requests = st.fixed_dictionaries(
    {"history": st.lists(item, max_size=30)},
    optional={
        "k": st.integers(1, 600),
        "exclude": st.lists(item, max_size=80),
        "exclude_seen": st.booleans(),
        "filters": st.lists(st.sampled_from([*FILTERS, "odd"]), max_size=3),
        "width": st.integers(1, 600),
        "decoder": st.sampled_from(["beam", "beam_sample", "ved"]),
        "per_prefix": st.integers(1, 5),
        "temperature": st.floats(0.01, 100),
        "seed": st.integers(0, 2**63 - 1),
        "deadline_ms": st.floats(0.001, 60_000),
        "explain": st.sampled_from(["none", "levels", "tree"]),
        "user": st.text(min_size=1, max_size=20),
    },
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
fields = st.sampled_from([
    "history", "user", "k", "exclude", "filters", "width", "decoder", "seed", "deadline_ms",
    "requests", "add", "remove", "update", "rollback_to", "version", "explain",
])  # fmt: skip


@pytest.mark.slow
@settings(max_examples=40)
@given(body=requests)
def test_valid_requests_are_answered_with_legal_items_or_refused(
    served: Served, body: dict[str, Any]
) -> None:
    response = served.send("/v1/recommend", json.dumps(body).encode())
    assert response.status_code in (200, 422)
    if response.status_code == 200:
        answer = RecommendResponse.model_validate_json(response.content)
        allowed = set(range(40)) - set(body.get("exclude", []))
        for name in body.get("filters", []):
            allowed &= FILTERS[name]
        if body.get("exclude_seen"):
            allowed -= set(body["history"])
        shown = [item.item_id for item in answer.items]
        assert len(set(shown)) == len(shown) == answer.returned <= body.get("k", 10)
        assert set(shown) <= allowed
        if answer.shortfall_reason == "exhausted":
            assert set(shown) == allowed


@pytest.mark.slow
@settings(max_examples=60)
@given(path=st.sampled_from(PATHS), body=anything | st.dictionaries(fields, anything, max_size=5))
def test_any_json_is_answered_or_refused(served: Served, path: str, body: object) -> None:
    served.send(path, json.dumps(body).encode())  # NaN and infinities included


@settings(max_examples=30)
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=60))
def test_any_bytes_are_refused(served: Served, path: str, body: bytes) -> None:
    assert served.send(path, body).status_code in (400, 401, 422)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"history": [1], "k": 0}', 422),
        ('{"history": [1], "k": -1}', 422),
        ('{"history": [1], "k": 512}', 200),
        ('{"history": [1], "k": 513}', 422),
        ('{"history": [1], "k": 1e99}', 422),
        ('{"history": [1], "k": NaN}', 422),
        ('{"history": [1], "k": true}', 422),
        ('{"history": [1], "temperature": NaN, "decoder": "beam_sample"}', 422),
        ('{"history": [1], "temperature": Infinity}', 422),
        ('{"history": [1], "deadline_ms": -1}', 422),
        ('{"history": [NaN]}', 422),
        ('{"history": [1.5]}', 422),
        ('{"history": ["1"]}', 422),
        ('{"history": null}', 422),
        ('{"history": [123456789012345678901234567890]}', 422),
        ('{"history": [999999, -7]}', 200),
        ('{"history": []}', 200),
        ('{"history": [1], "filters": ["../../etc/passwd"]}', 422),
        ('{"history": [1], "surprise": 1}', 422),
        ('{"user": "nobody"}', 404),
        ('{"history": [1], "user": "\\ud800"}', 422),
        ("{", 422),
        ("", 422),
        ("[" * 5000, 400),
        (json.dumps({"history": [i % 40 for i in range(10_000)]}), 200),
        (json.dumps({"history": list(range(10_000)), "exclude_seen": True}), 200),
        (json.dumps({"history": list(range(10_001))}), 422),
        (json.dumps({"history": [1], "exclude": list(range(40))}), 200),
    ],
)  # fmt: skip
def test_edge_cases(served: Served, body: str, status: int) -> None:
    response = served.send("/v1/recommend", body.encode())
    assert response.status_code == status, response.text


def test_paths_that_do_not_exist_and_bodies_that_are_too_large(served: Served) -> None:
    assert served.send("/v1/catalog", b"{}").status_code == 405
    assert served.send("/../../etc/passwd", b"").status_code == 404
    sizes = {"content-type": "text/plain", "content-length": str(1 << 40)}
    assert served.send("/v1/recommend", b"{}", **sizes).status_code == 413
