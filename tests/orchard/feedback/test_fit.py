"""Feedback counted as rows: what earned something, and recent requests foremost."""

from pathlib import Path

import numpy as np
import pytest

from orchard.catalog import catalog as catalogs
from orchard.data.prompts import Split
from orchard.feedback.fit import counted_weights, utilities_of, with_feedback
from orchard.feedback.join import JoinOptions, join
from orchard.feedback.rows import open_feedback
from orchard.feedback.write import write_feedback
from orchard.settings.rewards import UtilityConfig
from tests.orchard.feedback.conftest import Table

DAY = 86_400.0


def test_what_was_wanted_is_counted_less_the_older_it_is(
    tmp_path: Path, exposures: Table, events: Table
) -> None:
    catalog = catalogs.from_codes([[0], [1]], item_id=np.array([10, 11]), level_size=(2,))
    shown = exposures(
        [{"request_id": str(n), "time": n * DAY, "item_id": 10, "history": [11]} for n in range(4)]
    )
    seen = events(
        [
            {"request_id": str(n), "time": n * DAY, "item_id": 10, "value": value}
            for n, value in ((1, 2.0), (2, -1.0), (3, 1.0))
        ]
    )
    write_feedback(tmp_path / "out", join(shown, seen), JoinOptions())
    feedback = open_feedback([tmp_path / "out"], catalog, max_history=2)
    rows = Split(
        user=np.array([5]), history=np.array([0]), history_start=np.array([0, 1]),
        target=np.array([1]),
    )  # fmt: skip
    assert counted_weights(rows) is None
    for half_life, wanted in ((0.0, [1, 0, 2, 0, 1]), (2.0, [1, 0, 1, 0, 1])):
        weight = counted_weights(with_feedback(rows, feedback, half_life=half_life))
        assert weight is not None
        assert weight.tolist() == pytest.approx(wanted)
    fitted, of_feedback = utilities_of(UtilityConfig(clusters=()), catalog, rows, feedback)
    assert of_feedback
    root = fitted.values(np.zeros((1, 1), np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64))
    assert root[0, 0] == pytest.approx((2 - 1 + 1) / 4)
