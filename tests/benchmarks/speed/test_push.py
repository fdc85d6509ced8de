"""The push benchmark: every way arrives, and says how long each part took."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed import push

ROOT = Path(__file__).parents[3]


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
def test_every_way_loads_the_version_and_states_its_phases(tmp_path: Path) -> None:
    # In a process of its own, since the bench starts and ends a Ray of its own.
    subprocess.run(
        [sys.executable, "-m", "cluster.cli", "bench", "push", "--quick",
         "--json", str(tmp_path / "push.json")],
        cwd=ROOT, check=True, capture_output=True, timeout=280,
    )  # fmt: skip
    made = json.loads((tmp_path / "push.json").read_text())
    rows = {row["way"]: row for row in made["rows"] if "way" in row}
    assert set(rows) == set(push.WAYS)
    for row in rows.values():
        phases = sum(float(row[name]) for name in ("store_s", "pass_s", "verify_s", "load_s"))
        assert phases == pytest.approx(float(row["push_s"]))
    assert float(rows["by_value"]["copies"]) > 2
