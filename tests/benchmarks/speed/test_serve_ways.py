"""The rows of given items, growing histories and widths, on a tiny policy."""

from pathlib import Path

import pytest

from benchmarks.speed import serve_ways
from orchard.testing import tiny_setup
from serve.testing import export_policy


@pytest.mark.slow
def test_scores_and_kept_histories_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_ways, "ITEMS", (3, 40))
    monkeypatch.setattr(serve_ways, "GROWS", 5)
    world = tiny_setup(level_size=(5, 4, 6), num_items=40)
    folder = export_policy(world, tmp_path / "policy", step=1)
    figures, rows = serve_ways.run(folder, 40, 2)
    found = {one["name"]: one["value"] for one in figures}
    assert found["score_is_equal"] == 1
    assert found["prefix_cache_equal"] == 1
    tokens = {row["case"]: row.get("forward_tokens") for row in rows}
    assert tokens["score 40"] <= 20 + 5  # every inner prefix once
    assert {"growing", "growing, kept", "width 50", "width [16, 32, 50]"} <= tokens.keys()
