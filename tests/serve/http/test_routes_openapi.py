"""The API keeps what clients of the released document rely on."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchard.settings import ServeConfig
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics

RELEASED = json.loads((Path(__file__).parents[2] / "golden" / "openapi.json").read_text())
"""The document of the last release, as `tests/golden/record.py` records it."""


def breaks(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what clients of `then` miss, or are refused for, at an endpoint of `now`."""
    found: list[str] = []
    for path, operations in then["paths"].items():
        for method, operation in operations.items():
            where = f"{method.upper()} {path}"
            current = now["paths"].get(path, {}).get(method)
            if current is None:
                found.append(f"{where} is gone")
                continue
            for old, new, part in sides(operation, current):
                found += differences(then, old, now, new, f"{where} {part}", part == "request")
            parameters = {p["name"] for p in operation.get("parameters", ())}
            for one in current.get("parameters", ()):
                if one.get("required") and one["name"] not in parameters:
                    found.append(f"{where} requires the parameter {one['name']}")
    return found


def sides(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Schemas of the request and of the answer of one operation, then and now."""
    if "requestBody" in old:
        yield schema_of(old["requestBody"]), schema_of(new.get("requestBody", {})), "request"
    yield schema_of(old["responses"]["200"]), schema_of(new["responses"]["200"]), "answer"


def schema_of(part: dict[str, Any]) -> dict[str, Any]:
    return part.get("content", {}).get("application/json", {}).get("schema", {})


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema, or its alternatives other than null, without references."""
    if "$ref" in schema:
        return resolved(document, document["components"]["schemas"][schema["$ref"].split("/")[-1]])
    if "anyOf" in schema:
        parts = [one for part in schema["anyOf"] for one in resolved(document, part)]
        return [part for part in parts if part.get("type") != "null"]
    return [schema]


def differences(
    then: dict[str, Any],
    old: dict[str, Any],
    now: dict[str, Any],
    new: dict[str, Any],
    where: str,
    is_request: bool,
) -> Iterator[str]:
    """Fields that are gone, required anew, or of another type, and values that are refused."""
    before, after = resolved(then, old), resolved(now, new)
    kinds = [{str(part.get("type")) for part in parts if part} for parts in (before, after)]
    lost = kinds[0] - kinds[1] if is_request else kinds[1] - kinds[0]
    if kinds[0] and lost:
        yield f"{where}: {', '.join(sorted(lost))} where {', '.join(sorted(kinds[0]))} was"
    fields = [{k: v for p in parts for k, v in p.get("properties", {}).items()}
              for parts in (before, after)]  # fmt: skip
    required = [{k for p in parts for k in p.get("required", ())} for parts in (before, after)]
    for name, schema in fields[0].items():
        if name not in fields[1]:
            yield f"{where}: {name} is gone"
        else:
            inside = f"{where}.{name}"
            yield from differences(then, schema, now, fields[1][name], inside, is_request)
    if is_request:
        yield from (f"{where}: {name} is required" for name in sorted(required[1] - required[0]))
        values = [{v for p in parts for v in p.get("enum", ())} for parts in (before, after)]
        yield from (f"{where}: {value} is refused" for value in sorted(values[0] - values[1]))
    else:
        gone = (required[0] & fields[1].keys()) - required[1]
        yield from (f"{where}: {name} may be missing" for name in sorted(gone))
    items = [next((p["items"] for p in parts if "items" in p), {}) for parts in (before, after)]
    if items[0]:
        yield from differences(then, items[0], now, items[1], f"{where}[]", is_request)


@pytest.fixture
def document(folder: Path) -> dict[str, Any]:
    app = create_app(open_service(folder, ServeConfig(), InMemoryMetrics()))
    return json.loads(json.dumps(app.openapi()))


def test_clients_of_the_released_document_lose_nothing(document: dict[str, Any]) -> None:
    assert breaks(RELEASED, document) == []


def schema(document: dict[str, Any], name: str) -> dict[str, Any]:
    return document["components"]["schemas"][name]


def without_path(document: dict[str, Any]) -> None:
    del document["paths"]["/v1/items/{item_id}"]


def without_answer_field(document: dict[str, Any]) -> None:
    del schema(document, "Item")["properties"]["title"]


def without_request_field(document: dict[str, Any]) -> None:
    del schema(document, "RecommendRequest")["properties"]["exclude"]


def with_required_field(document: dict[str, Any]) -> None:
    schema(document, "RecommendRequest")["required"] = ["user"]


def with_another_type(document: dict[str, Any]) -> None:
    schema(document, "RecommendRequest")["properties"]["exclude_seen"] = {"type": "string"}


def with_fewer_values(document: dict[str, Any]) -> None:
    schema(document, "RecommendRequest")["properties"]["explain"]["enum"].remove("tree")


def with_answer_field_that_may_be_missing(document: dict[str, Any]) -> None:
    schema(document, "RecommendResponse")["required"].remove("policy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_path, "GET /v1/items/{item_id} is gone"),
        (without_answer_field, "POST /v1/recommend answer.items[]: title is gone"),
        (without_request_field, "POST /v1/recommend request: exclude is gone"),
        (with_required_field, "POST /v1/recommend:batch request.requests[]: user is required"),
        (with_another_type, "POST /v1/recommend request.exclude_seen: boolean where boolean was"),
        (with_fewer_values, "POST /v1/recommend request.explain: tree is refused"),
        (with_answer_field_that_may_be_missing, "POST /v1/recommend answer: policy may be missing"),
    ],
)
def test_each_break_is_found(
    change: Callable[[dict[str, Any]], None], message: str, document: dict[str, Any]
) -> None:
    changed = copy.deepcopy(document)
    change(changed)
    assert message in breaks(document, changed)


def test_what_is_added_breaks_nothing(document: dict[str, Any]) -> None:
    added = copy.deepcopy(document)
    schema(added, "Item")["properties"]["price"] = {"type": "number"}
    schema(added, "RecommendRequest")["properties"]["color"] = {"type": "string"}
    added["paths"]["/v1/more"] = added["paths"]["/v1/policy"]
    assert breaks(document, added) == []
