"""Off-policy evaluation on an exposure log of another policy."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli.off_policy import evaluate_log
from orchard.errors import DataError
from orchard.evaluation.off_policy import OffPolicyEstimate
from orchard.policy import weights
from orchard.testing import TinySetup, brute_force, tiny_setup
from orchard.types import Prompts
from rollout.engine.torch import TorchEngine
from rollout.search.draws import sample
from serve.exposure_log import SCHEMA
from serve.testing import export_policy

HISTORY = [3, 17, 5]


def drawn(world: TinySetup, number: int) -> list[dict[str, object]]:
    """Return single draws after one history, as the endpoint logs them."""
    items = world.catalog
    form = world.tokenizer
    rows = np.array(HISTORY)
    token, start = form.encode_history(rows, np.array([0, 3]))
    prompts = Prompts(
        id=np.zeros(1, np.int64), target=np.zeros(1, np.int64), history=rows,
        history_start=np.array([0, 3]), token=token, token_start=start,
    )  # fmt: skip
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    found = sample(engine, prompts, count=number, temperature=1.0, seed=0)
    return [
        {
            "request_id": str(place), "item_id": int(items.item_of_leaf[items.leaf_start[leaf]]),
            "decoder": "beam_sample", "width": 1, "temperature": 1.0, "restricted": False,
            "source": "policy", "shadow": False, "history": HISTORY,
            "logprob": found.logprob[place].tolist(),
        }
        for place, leaf in enumerate(found.leaf.tolist())
    ]  # fmt: skip


@pytest.mark.slow
def test_a_policy_is_judged_by_what_another_one_drew(tmp_path: Path) -> None:
    world = tiny_setup(num_items=40)
    rows = drawn(world, 3000)
    rows.append(rows[0] | {"request_id": "slate", "width": 10})
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "log.parquet")
    reward = np.random.default_rng(0).random(40)
    pq.write_table(
        pa.table(
            {
                "request_id": [row["request_id"] for row in rows],
                "item_id": [row["item_id"] for row in rows],
                "reward": [reward[row["item_id"]] for row in rows],  # type: ignore[index]
            }
        ),
        tmp_path / "rewards.parquet",
    )
    values = weights.snapshot(world.model)
    name = next(iter(values))
    weights.restore(world.model, values | {name: values[name] * 0.8})
    folder = export_policy(world, tmp_path / "policy", step=1)
    items = world.catalog
    form = world.tokenizer
    token, _ = form.encode_history(np.array(HISTORY), np.array([0, 3]))
    logprob = brute_force(world.model, world.tokenizer, token)
    truth = float(np.exp(logprob) @ reward[items.item_of_leaf[items.leaf_start[:-1]]])

    found = evaluate_log(folder, tmp_path / "log.parquet", tmp_path / "rewards.parquet", None)
    for estimator in ("is", "snips", "pdis", "dr"):
        one = found.value[estimator]
        assert one.n == 3000
        assert one.low - 0.01 < truth < one.high + 0.01, estimator
    width = {name: one.high - one.low for name, one in found.value.items()}
    assert width["dr"] < width["is"]


def test_a_log_without_single_draws_is_refused(tmp_path: Path) -> None:
    world = tiny_setup(num_items=40)
    folder = export_policy(world, tmp_path / "policy", step=1)
    rows = [row | {"decoder": "beam"} for row in drawn(world, 5)]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "log.parquet")
    nothing = {"request_id": ["1"], "item_id": [1], "reward": [1.0]}
    pq.write_table(pa.table(nothing), tmp_path / "rewards.parquet")
    with pytest.raises(DataError, match="of 5 rows of .* none is a single unrestricted draw"):
        evaluate_log(folder, tmp_path / "log.parquet", tmp_path / "rewards.parquet", None)


def judged(
    world: TinySetup, tmp_path: Path, rows: list[dict[str, object]], reward: dict[str, float]
) -> OffPolicyEstimate:
    """Judge the logging policy by its own draws; `reward` by request, for every item it showed."""
    folder = export_policy(world, tmp_path / "policy", step=1)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "log.parquet")
    earned = [
        {"request_id": row["request_id"], "item_id": row["item_id"],
         "reward": reward[str(row["request_id"])]}
        for row in rows
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(earned), tmp_path / "rewards.parquet")
    return evaluate_log(folder, tmp_path / "log.parquet", tmp_path / "rewards.parquet", None)


@pytest.mark.slow
def test_a_draw_of_an_item_that_the_catalog_lacks_counts_with_weight_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = tiny_setup(num_items=40)
    rows = [row | {"catalogue": "3-0badcafe"} for row in drawn(world, 400)]
    foreign = [
        row | {"request_id": f"foreign-{place}", "item_id": 10_000 + place, "logprob": [-1.0] * 5}
        for place, row in enumerate(rows)
    ]
    found = judged(
        world, tmp_path, [*rows, *foreign], {str(r["request_id"]): 2.0 for r in rows + foreign}
    )
    # Half the draws are those of the judged policy, with weight 1; the others have weight 0.
    for estimator in ("is", "pdis"):
        assert found.value[estimator].mean == pytest.approx(1.0, abs=1e-5)
        assert found.value[estimator].n == 800
    assert found.value["snips"].mean == pytest.approx(2.0, abs=1e-5)
    assert found.value["logged"].mean == 2.0
    assert found.effective == pytest.approx(400, rel=1e-4)
    assert np.isfinite(found.value["dr"].mean)
    said = capsys.readouterr().out
    assert f"{world.catalog.digest[:8]}; 400 cannot be drawn from it" in said


def test_a_draw_that_shows_two_items_of_one_semantic_id_is_one_decision(tmp_path: Path) -> None:
    world = tiny_setup(num_items=40)
    catalog = world.catalog
    rows: list[dict[str, object]] = []
    for row in drawn(world, 300):
        leaf = catalog.leaf_of_item[catalog.rows(np.array([row["item_id"]]))[0]]
        items = catalog.item_of_leaf[catalog.leaf_start[leaf] : catalog.leaf_start[leaf + 1]]
        rows += [
            row | {"item_id": int(catalog.item_id[item]), "rank": rank, "time": 1.0}
            for rank, item in enumerate(items, start=1)
        ]
    assert len(rows) > 300
    found = judged(world, tmp_path, rows, {str(row["request_id"]): 1.0 for row in rows})
    assert found.value["is"].n == 300
    assert found.value["is"].mean == pytest.approx(len(rows) / 300, rel=1e-5)
    assert found.value["snips"].mean == pytest.approx(len(rows) / 300, rel=1e-5)


def test_an_item_that_another_one_hides_in_the_judged_catalog_cannot_be_drawn(
    tmp_path: Path,
) -> None:
    world = tiny_setup(num_items=40)
    catalog = world.catalog
    (second,) = np.flatnonzero(catalog.place_in_leaf == 1)[:1]
    rows = drawn(world, 50)
    hidden = [row | {"request_id": f"h{n}", "item_id": int(second)} for n, row in enumerate(rows)]
    found = judged(
        world, tmp_path, rows + hidden, {str(r["request_id"]): 1.0 for r in rows + hidden}
    )
    assert found.value["is"].mean == pytest.approx(0.5, abs=1e-5)
