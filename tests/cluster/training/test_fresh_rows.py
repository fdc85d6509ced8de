"""Fresh rows in a run: which phase learns from which rows, without Ray."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.training.hit_shares import hits, warning
from cluster.training.learner_spec import learner_spec
from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir, save_policy
from orchard import config
from orchard.data.prompts import make_prompts
from orchard.data.synthetic import write_world
from orchard.errors import ConfigError
from orchard.policy import model
from orchard.policy.weights import digest, snapshot
from orchard.settings import Config
from orchard.types import PolicyVersion
from rollout.actor import RolloutWorker
from tests.fixtures.runs import TINY_WORLD

Load = Callable[..., Config]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "data"
    write_world(folder, TINY_WORLD)
    rows = pq.read_table(folder / "train.parquet")
    pq.write_table(rows.slice(0, 100), folder / "early.parquet")
    pq.write_table(rows.slice(100, 60), folder / "later.parquet")
    pq.write_table(rows.slice(160, 30), folder / "latest.parquet")
    return folder


@pytest.fixture
def load(data: Path, tmp_path: Path) -> Load:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        name = "toy"
        output = "{tmp_path / "runs"}"
        data.path = "{data}"
        data.train = ["early.parquet"]
        model = {{hidden_size = 16, heads = 2, kv_heads = 1, intermediate_size = 16, layers = 1}}
        [rollout]
        engine = "torch"
        group_size = 6
        threads = 1
        """
    )
    return lambda *overrides: config.load(path, overrides)


def start(settings: Config) -> Run:
    """Create an SFT policy."""
    run = prepare(settings, "sft")
    open_run_dir(run)
    weights = snapshot(model.create(run.config.model, run.tokenizer, seed=0))
    save_policy(run, run.result, PolicyVersion(step=0, digest=digest(weights)), weights)
    return run


def test_training_takes_fresh_rows_that_come_after_the_warm_start(load: Load) -> None:
    first = start(load())
    assert first.rows is first.train
    assert "fresh" not in first.data
    later = prepare(load("data.fresh=['later.parquet']"), "train")
    assert later.rows is later.fresh
    assert len(later.rows) == 60
    assert later.data["fresh"] == later.rows.digest
    assert later.data["train"] == first.data["train"]
    assert learner_spec(later).data == later.rows.digest
    open_run_dir(later)
    with pytest.raises(ConfigError, match="other data.*fresh has content"):
        prepare(load("data.fresh=['latest.parquet']"), "train")
    old = prepare(load("data.fresh=['later.parquet']", "learner.rows=train"), "train")
    assert old.rows is old.train


def test_rows_held_back_are_left_out_of_the_warm_start_and_of_the_counts(load: Load) -> None:
    changes = ["data.hold_back=0.3", "rewards.weights={transition=1.0}"]
    first = start(load(*changes))
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
    first = start(load(*changes))
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


def test_a_share_clearly_above_that_of_held_out_rows_is_warned_of(load: Load) -> None:
    first = start(load())
    run = prepare(load(), "train")
    much, little = np.array([500, 2000]), np.array([90, 500])
    text = warning(much, little, run)
    assert text is not None
    assert "25.0 % of the training prompts" in text
    assert "18.0 % of held-out rows" in text
    assert "data.hold_back" in text
    assert warning(np.array([50, 200]), np.array([9, 50]), run) is None  # by chance, perhaps
    assert warning(little, much, run) is None
    assert warning(np.array([0, 0]), little, run) is None
    assert warning(np.array([0, 10]), np.array([0, 10]), run) is None
    fresh = prepare(load("data.fresh=['later.parquet']"), "train")
    assert "lower learner.steps" in (warning(much, little, fresh) or "")
    old = prepare(load("data.fresh=['later.parquet']", "learner.rows=train"), "train")
    assert 'learner.rows = "auto"' in (warning(much, little, old) or "")
    assert first.fresh is None


def test_hits_are_groups_that_hold_their_target(load: Load) -> None:
    start(load())
    run = prepare(load(), "train")
    worker = RolloutWorker(run.config.rollout, run.policy, run.tokenizer, 0, None, None)
    trees = worker.search(make_prompts(run.tokenizer, run.valid, np.arange(20)), seed=0)
    target = run.catalog.leaf_of_item[run.valid.target[:20]]
    bounds = trees.candidate_start
    expected = sum(
        target[i] in trees.leaf[bounds[i] : bounds[i + 1]].tolist() for i in range(len(target))
    )
    assert hits(trees, run) == expected > 0
