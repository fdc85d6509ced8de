"""Attribute values have the type of their column, as the file gave it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from orchard.errors import ConfigError
from orchard.settings import FilterConfig
from serve.catalog.attributes import Value, read_attributes
from serve.catalog.schema import DeltaRequest

FILE = {
    "item_id": [1, 2, 3],
    "price": pa.array([1.5, None, float("nan")], pa.float32()),
    "size": pa.array([1, 2, 3], pa.int8()),
    "color": ["red", None, "blue"],
    "kind": pa.array(["a", "b", None]).dictionary_encode(),
    "stock": [True, False, None],
    "tags": [["x"], [], None],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "attributes.parquet"
    pq.write_table(pa.table(FILE), path)
    return path


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("price", 2, True), ("price", 2.5, True), ("price", None, True), ("price", "75.0", False),
        ("price", True, False), ("price", 1e39, False), ("price", 10**400, False),
        ("size", 127, True), ("size", 128, False), ("size", 3.0, False), ("size", "3", False),
        ("size", False, False), ("color", "green", True), ("color", 1, False),
        ("kind", "c", True), ("kind", 1.5, False), ("stock", False, True), ("stock", 1, False),
        ("stock", "true", False), ("tags", "x", False), ("weight", 1, False),
    ],
)  # fmt: skip
def test_a_value_of_another_type_than_its_column_is_refused(
    file: Path, name: str, value: Value, fits: bool
) -> None:
    attributes = read_attributes(file, {})
    if fits:
        assert attributes.with_changes({1: {name: value}}).changed == {1: {name: value}}
        return
    with pytest.raises(ConfigError, match=f"attribute {name} of item 1 is "):
        attributes.with_changes({1: {name: value}})
    assert attributes.with_changes({1: {name: value}}, strict=False).changed == {}


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", '["x"]', '{"a": 1}'])
def test_what_json_cannot_hold_is_no_attribute(text: str) -> None:
    body = f'{{"update": [{{"item_id": 1, "attributes": {{"price": {text}}}}}]}}'
    with pytest.raises(ValidationError):
        DeltaRequest.model_validate_json(body)


def test_values_keep_their_type_from_the_request_on() -> None:
    body = '{"update": [{"item_id": 1, "attributes": {"a": "75.0", "b": 1, "c": true, "d": 1.0}}]}'
    (item,) = DeltaRequest.model_validate_json(body).update
    assert [type(value) for value in item.attributes.values()] == [str, int, bool, float]


def test_unknown_values_pass_no_filter_and_odd_columns_only_matter_to_one(file: Path) -> None:
    by = FilterConfig(column="price", op="!=", value=9)
    attributes = read_attributes(file, {"other": by})
    assert attributes.passing(attributes.item_id, by).tolist() == [True, False, False]
    kind = FilterConfig(column="kind", value="a")
    assert attributes.passing(attributes.item_id, kind).tolist() == [True, False, False]
    with pytest.raises(ConfigError, match=r"'tags' of .* holds list<.*>, which no filter compares"):
        read_attributes(file, {"tagged": FilterConfig(column="tags", value="x")})
