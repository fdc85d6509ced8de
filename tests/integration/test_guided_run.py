"""A guided run from its settings to the learner's batch, without actors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.training.loop import step_metrics
from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir, save_policy
from learner.batch.pack import make_batch
from orchard import config
from orchard.data.prompts import make_prompts
from orchard.errors import ConfigError
from orchard.policy import model, value_head
from orchard.policy.weights import digest, snapshot
from orchard.settings import Config
from orchard.types import PolicyVersion, ScoredTrees, TrainBatch, Update
from rewards.score import score_all
from rollout.actor import RolloutWorker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(data: Path) -> Path:
    """Small synthetic data set with embeddings."""
    draw, ids = np.random.default_rng(0), pq.read_table(data / "items.parquet")["item_id"]
    rows = draw.normal(size=(len(ids), 4)).tolist()
    pq.write_table(pa.table({"item_id": ids, "embedding": rows}), data / "embeddings.parquet")
    return data


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Callable[..., Config]:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        name = "guided"
        output = "{tmp_path / "runs"}"
        data.path = "{data}"
        [model]
        hidden_size = 32
        heads = 2
        kv_heads = 1
        intermediate_size = 32
        layers = 1
        value_head = true
        [rollout]
        engine = "torch"
        search = "ved"
        group_size = 6
        threads = 1
        ved = {{budget = 17, width = 4}}
        [learner]
        estimator = "group_sibling"
        """
    )
    return lambda *changes: config.load(path, changes)


def guided(settings: Config) -> Run:
    """Create a run that starts from a saved policy with a value head."""
    first = prepare(settings, "sft")
    open_run_dir(first)
    policy = model.create(first.config.model, first.tokenizer, seed=0)
    value_head.attach(policy, seed=1)
    weights = snapshot(policy)
    save_policy(first, first.result, PolicyVersion(step=0, digest=digest(weights)), weights)
    return prepare(settings, "train")


def search(run: Run, *, name: str | None = None) -> ScoredTrees:
    rollout_worker = RolloutWorker(run.config.rollout, run.policy, run.tokenizer, seed=0)
    trees = rollout_worker.search(
        make_prompts(run.tokenizer, run.train, np.arange(8)), seed=0, name=name
    )
    return score_all(trees, run.reward_context, run.config.rewards.weights)


def train_batch(scored: ScoredTrees, run: Run) -> TrainBatch:
    return make_batch(scored, run.tokenizer, run.config.learner)


def test_an_exported_head_is_loaded_with_its_policy(settings: Callable[..., Config]) -> None:
    run = guided(settings())
    loaded = model.load(run.policy, run.tokenizer)
    assert value_head.value_head_of(loaded) is not None
    assert sorted(path.name for path in run.policy.glob("*.safetensors")) == [
        "model.safetensors",
        "value_head.safetensors",
    ]
    names = set(snapshot(loaded))
    assert names > set(snapshot(model.create(run.config.model, run.tokenizer, seed=0)))


@pytest.mark.slow
def test_guided_trees_carry_values_and_become_a_batch_that_teaches_them(
    settings: Callable[..., Config],
) -> None:
    run = guided(settings())
    scored = search(run)
    assert scored.trees.value is not None
    batch = train_batch(scored, run)
    assert batch.values is not None
    assert len(batch.values.row) == (scored.trees.step > 0).sum()
    metrics = step_metrics(scored, Update(policy=scored.trees.policy, metrics={}), lag=0)
    assert metrics["rollout/traversals"] > 0
    assert metrics["rollout/leaf_tokens"] > 0
    assert metrics["rollout/forward_tokens"] <= 8 * 16
    assert search(run, name="beam").trees.value is None


@pytest.mark.slow
def test_embeddings_of_the_data_set_change_what_the_head_is_taught(
    settings: Callable[..., Config],
) -> None:
    codes, items = settings(), settings("data.embeddings=embeddings.parquet", "name=other")
    scored = search(run := guided(codes))
    embedded = guided(items)
    again = score_all(scored.trees, embedded.reward_context, run.config.rewards.weights)
    by_code, by_item = train_batch(scored, run).values, train_batch(again, embedded).values
    assert by_code is not None
    assert by_item is not None
    assert not np.allclose(by_code.reward, by_item.reward)
    np.testing.assert_array_equal(by_code.path, by_item.path)


@pytest.mark.slow
def test_a_head_may_foretell_what_the_run_pays(settings: Callable[..., Config]) -> None:
    run = guided(settings("learner.value.outcome={rule=2.0}"))
    scored = search(run)
    values = train_batch(scored, run).values
    assert values is not None
    hit = np.zeros(len(scored.trees.step), np.float32)
    hit[scored.trees.candidate] = 2 * scored.parts["rule"]
    np.testing.assert_array_equal(values.reward, hit[scored.trees.step > 0])


def test_a_run_without_a_head_packs_no_targets(settings: Callable[..., Config]) -> None:
    run = guided(settings("model.value_head=false", "rollout.search=beam"))
    assert train_batch(search(run), run).values is None


def test_a_budget_that_does_not_cover_the_catalog_is_refused_before_anything_starts(
    settings: Callable[..., Config],
) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.ved\.budget = 8 cannot cover depth 3"):
        prepare(settings("rollout.ved.budget=8"), "sft")


def test_the_published_run_is_valid() -> None:
    published = config.load(ROOT / "cluster" / "runs" / "vstar_industrial.toml")
    assert published.rollout.search == "ved"
    assert published.learner.estimator == "group_sibling"
