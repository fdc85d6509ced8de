"""Measures of codes."""

import json
from pathlib import Path

import pytest

from orchard.catalog import catalog as catalogs
from orchard.semantic_ids.measure import measure_codes


def test_the_published_ids_measure_as_published(shared_data: Path) -> None:
    folder = shared_data / "amazon_industrial"
    stats = json.loads((folder / "stats.json").read_text())["sid"]
    found = measure_codes(catalogs.read(folder / "items.parquet").codes)
    assert found["distinct"] == stats["unique_sids"]
    assert found["colliding_items"] == stats["items_in_collisions"]
    assert found["largest_collision"] == stats["largest_group"]
    for level, known in zip(found["levels"], stats["levels"], strict=True):
        assert level["codes_used"] == known["codes_used"]
        assert level["perplexity"] == pytest.approx(known["code_perplexity"], abs=0.05)
        assert level["prefixes"] == known["parent_prefixes"]
        assert level["children_max"] == known["children_max"]
        assert level["single_child_share"] == pytest.approx(known["forced_share"], abs=5e-5)
