"""Fresh rows in a run: which phase learns from which rows, without Ray."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.training.learner_spec import learner_spec
from cluster.training.run import prepare
from cluster.training.run_dir import open_run_dir
from orchard.errors import ConfigError
from orchard.settings import Config
from tests.fixtures.begun import untrained

Load = Callable[..., Config]


def test_training_takes_fresh_rows_that_come_after_the_warm_start(load: Load) -> None:
    first = untrained(load())
    assert first.rows is first.train
    assert "fresh" not in first.data
    later = prepare(load("data.fresh=['later.parquet']"), "train")
    assert later.rows is later.fresh
    assert len(later.rows) == 60
    assert later.data["fresh"] == later.rows.digest
    assert later.data["train"] == first.data["train"]
    assert learner_spec(later).data == later.rows.digest
    open_run_dir(later)
    with pytest.raises(ConfigError, match="different data.*fresh has content"):
        prepare(load("data.fresh=['latest.parquet']"), "train")
    old = prepare(load("data.fresh=['later.parquet']", "learner.rows=train"), "train")
    assert old.rows is old.train


def test_rows_held_back_are_left_out_of_the_warm_start_and_of_the_counts(load: Load) -> None:
    changes = ["data.hold_back=0.3", "rewards.weights={transition=1.0}"]
    first = untrained(load(*changes))
    assert first.fresh is not None
    assert len(first.train) + len(first.fresh) == 100
    windows = learner_spec(first).sequences
    assert windows is not None
    assert first.rows is first.train
    assert len(first.leaf_rows) == len(first.train)
    run = prepare(load(*changes), "train")
    assert run.rows.digest == first.fresh.digest
    assert len(prepare(load(*changes, "guide.counts=all"), "train").leaf_rows) == 100
    # Rewards leave out a row's own counts, and so count every row that prompts are drawn from.
    whole = prepare(load("name=whole", "rewards.weights={transition=1.0}"), "sft").transitions
    assert run.transitions is not None
    assert whole is not None
    np.testing.assert_array_equal(run.transitions.pair, whole.pair)
    np.testing.assert_allclose(run.transitions.weight, whole.weight)


def test_the_control_continues_supervision_on_the_same_rows(load: Load) -> None:
    changes = ["data.hold_back=0.3"]
    first = untrained(load(*changes))
    assert first.fresh is not None
    control = load(*changes, "name=control", f"model.path={first.result}", "sft.rows=fresh")
    run = prepare(control, "sft")
    assert run.policy == first.result
    assert run.rows.digest == first.fresh.digest
    windows = learner_spec(run).sequences
    assert windows is not None
    trained = sum(np.diff(windows.start) - windows.fresh)
    assert trained == len(first.fresh)  # targets alone, each once


def test_rationales_follow_their_rows(load: Load, data: Path) -> None:
    rows = pq.read_table(data / "early.parquet")
    texts = ["".join(f"<think>{n} {level}</think>" for level in range(3)) for n in range(len(rows))]
    pq.write_table(rows.append_column("why", [texts]), data / "reasons.parquet")
    changes = ["data.train=['reasons.parquet']", "data.rationales=why", "data.hold_back=0.3"]
    run = prepare(load(*changes), "sft")
    assert run.traces is not None
    assert run.train.row is not None
    assert len(run.traces) == len(run.train)
    token, begin = run.traces.token, run.traces.token_start
    for index in (0, len(run.train) - 1):
        first = token[begin[3 * index] : begin[3 * index + 1]]
        assert run.text_tokenizer.decode(first[1:-1]) == f"{run.train.row[index]} 0"
