"""Feedback folders as requests and shown items of a catalog."""

from pathlib import Path

import numpy as np
import pytest

from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import DataError
from orchard.evaluation.lists import inclusion
from orchard.feedback.join import JoinOptions, join
from orchard.feedback.rows import open_feedback
from orchard.feedback.write import write_feedback
from tests.orchard.feedback.conftest import Table


@pytest.fixture
def catalog() -> Catalog:
    return catalogs.from_codes(
        [[0, 1], [0, 2], [1, 0], [1, 1]], item_id=np.array([10, 11, 12, 13]), level_size=(2, 3)
    )


def test_requests_have_their_best_item_as_target(
    tmp_path: Path, catalog: Catalog, exposures: Table, events: Table
) -> None:
    common = {"sid": [0, 1], "logprob": [-0.5, -0.25], "history": [10, 99, 11, 12]}
    shown = exposures(
        [
            common | {"request_id": "b", "time": 2.0, "item_id": 13, "sid": [1, 1], "rank": 1},
            common | {"request_id": "b", "time": 2.0, "item_id": 10, "rank": 2, "user": "u"},
            common | {"request_id": "a", "time": 1.0, "item_id": 10, "user": "u"},
            common | {"request_id": "c", "time": 3.0, "item_id": 99},
            common | {"request_id": "d", "time": 3.0, "item_id": 10, "history": [99]},
            common | {"request_id": "a", "time": 4.0, "item_id": 11, "history": [13]},
        ]
    )
    joined = join(shown, events([{"request_id": "b", "item_id": 10, "time": 3.0}]))
    write_feedback(tmp_path / "out", joined, JoinOptions())
    found = open_feedback([tmp_path / "out"], catalog, max_history=2)
    requests = found.requests
    assert found.row_start.tolist() == [0, 1, 3, 4]
    assert found.item.tolist() == [0, 3, 0, 1]
    assert found.reward.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert requests.target.tolist() == [0, 0, 1]
    assert requests.reward is not None
    assert requests.reward.tolist() == [0.0, 1.0, 0.0]
    assert requests.history.tolist() == [1, 2, 1, 2, 3]
    assert requests.history_start.tolist() == [0, 2, 4, 5]
    assert requests.user[0] == requests.user[1] != requests.user[2]
    assert found.facts == {"unmapped": 1, "without_history": 1}
    # Only codes that the item still has, have a known probability; [0, 1] is not item 11's path.
    assert np.isnan(found.logprob[3]).all()
    assert found.logprob[:3].tolist() == [[-0.5, -0.25]] * 3
    examples = found.examples(catalog)
    assert examples.leaf.tolist() == catalog.leaf_of_item[found.item].tolist()


def test_only_draws_from_the_policy_have_a_width(
    tmp_path: Path, catalog: Catalog, exposures: Table, events: Table
) -> None:
    rows = [
        {}, {"width": 4}, {"decoder": "beam"}, {"temperature": 0.5}, {"restricted": True},
        {"source": "popular"},
    ]  # fmt: skip
    shown = exposures(
        [
            row | {"request_id": str(n), "time": float(n), "item_id": 10, "history": [11]}
            for n, row in enumerate(rows)
        ]
    )
    write_feedback(tmp_path / "out", join(shown, events([])), JoinOptions())
    found = open_feedback([tmp_path / "out"], catalog, max_history=2)
    assert found.width.tolist() == [1, 4, 0, 0, 0, 0]


def test_feedback_of_another_catalog_is_refused(
    tmp_path: Path, catalog: Catalog, exposures: Table, events: Table
) -> None:
    shown = exposures([{"item_id": 99}, {"item_id": 10, "history": [98]}])
    write_feedback(tmp_path / "out", join(shown, events([])), JoinOptions())
    with pytest.raises(DataError, match="1 are not in the catalog of 4 items, and 1 have no"):
        open_feedback([tmp_path / "out"], catalog, max_history=2)


def test_draws_have_the_probability_with_which_they_were_shown(
    tmp_path: Path, catalog: Catalog, exposures: Table, events: Table
) -> None:
    half, quarter = float(np.log(0.5)), float(np.log(0.25))
    common = {"history": [10], "item_id": 10, "sid": [0, 1], "logprob": [half, half]}
    other = {"rank": 2, "item_id": 13, "sid": [1, 1], "logprob": [half, quarter]}
    shown = exposures(
        [
            common | {"request_id": "one", "time": 1.0},
            common | {"request_id": "list", "time": 2.0, "width": 2},
            common | other | {"request_id": "list", "time": 2.0, "width": 2},
            common | {"request_id": "cut", "time": 3.0, "width": 5},  # four draws were not shown
            common | {"request_id": "beam", "time": 4.0, "decoder": "beam"},
        ]
    )
    joined = join(shown, events([{"request_id": "list", "item_id": 13, "time": 3.0}]))
    write_feedback(tmp_path / "out", joined, JoinOptions())
    single = open_feedback([tmp_path / "out"], catalog, max_history=2).draws
    assert single.target.tolist() == [0]
    assert single.logged is not None
    np.testing.assert_allclose(np.exp(single.logged), [0.25])
    draws = open_feedback([tmp_path / "out"], catalog, 2, "independent").draws
    assert draws.target.tolist() == [0, 0, 3]
    assert draws.reward is not None
    assert draws.reward.tolist() == [0.0, 0.0, 1.0]
    assert draws.history.tolist() == [0, 0, 0]
    assert draws.logged is not None
    wanted = inclusion(np.log(np.array([[0.25, 0.125]])), np.array([2]))[0]
    np.testing.assert_allclose(np.exp(draws.logged), [0.25, *wanted])
    assert draws.digest != single.digest


def test_deterministic_answers_have_no_importance_weights(
    tmp_path: Path, catalog: Catalog, exposures: Table, events: Table
) -> None:
    shown = exposures([{"item_id": 10, "history": [11], "sid": [0, 1], "decoder": "beam"}])
    write_feedback(tmp_path / "out", join(shown, events([])), JoinOptions())
    found = open_feedback([tmp_path / "out"], catalog, max_history=2)
    with pytest.raises(DataError, match="none of 1 .*or learn by utilities") as error:
        _ = found.draws
    assert error.value.code == "data.no_logprobs"
    assert len(found.examples(catalog).leaf) == 1  # utilities still work
