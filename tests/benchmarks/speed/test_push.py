"""The push benchmark: every way arrives, and says how long each part took."""

import pytest

from benchmarks.speed import push


@pytest.mark.ray
@pytest.mark.slow
def test_every_way_loads_the_version_and_states_its_phases() -> None:
    made = push.run(quick=True)
    rows = {row["way"]: row for row in made["rows"] if "way" in row}
    assert set(rows) == set(push.WAYS)
    for row in rows.values():
        phases = sum(float(row[name]) for name in ("store_s", "pass_s", "verify_s", "load_s"))
        assert phases == pytest.approx(float(row["push_s"]))
    assert float(rows["by_value"]["copies"]) > 2
