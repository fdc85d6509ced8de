"""A thinking run from its settings to an update, without actors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.training.loop import step_metrics
from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir, save_policy
from learner.batch.pack import make_batch
from learner.batch.sft import pack_traces
from learner.logprobs import choice_logprobs, to_tensors
from learner.trainer import Trainer
from orchard import config
from orchard.data.prompts import make_prompts
from orchard.errors import ConfigError, DataError
from orchard.evaluation.ranking import diversity
from orchard.policy import model
from orchard.policy.weights import digest, snapshot
from orchard.settings import Config
from orchard.types import PolicyVersion, SearchTrees, Update
from rewards.score import score_trees
from rewards.steps import add_step_rewards
from rollout.actor import RolloutWorker

ROOT = Path(__file__).parents[2]
VERSION = PolicyVersion(step=0, digest="")


@pytest.fixture(scope="module")
def settings(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "run.toml"
    path.write_text(
        f"""
        name = "thoughtful"
        output = "{folder}"
        data = {{path = "{data}", rationale_template = "seen {{seen}}, next {{next}}"}}
        model = {{hidden_size = 32, heads = 2, kv_heads = 1, intermediate_size = 32, layers = 1}}
        rewards = {{weights = {{rule = 1.0}}}}
        learner = {{estimator = "sapo", std_epsilon = 1e-6, lr = 1e-3}}
        evaluate = {{think = true}}
        [rollout]
        engine = "torch"
        search = "think"
        group_size = 4
        threads = 1
        think = {{block_tokens = 24}}
        """
    )
    return lambda *changes: config.load(path, changes)


def learner(run: Run, policy: model.PreTrainedModel, *, lr: float = 1e-3) -> Trainer:
    rates = run.config.learner.model_copy(update={"lr": lr})
    return Trainer(policy, run.tokenizer, rates, total_steps=100)


@pytest.fixture(scope="module")
def taught(settings: Callable[..., Config]) -> tuple[Run, list[float]]:
    """Return a run that is ready for RL, and the losses of its short SFT."""
    run = prepare(settings(), "sft")
    open_run_dir(run)
    assert run.traces is not None
    policy = model.create(run.config.model, run.tokenizer, seed=0)
    teacher, losses = learner(run, policy, lr=1e-2), list[float]()
    for number in range(40):
        rows = np.arange(16) + 16 * (number % 8)
        batch = pack_traces(run.train, run.traces, rows, run.tokenizer, VERSION)
        losses.append(teacher.sft_step(batch)["nll"])
    weights = snapshot(policy)
    save_policy(run, run.result, PolicyVersion(step=0, digest=digest(weights)), weights)
    return prepare(settings(), "train"), losses


def test_traces_are_scored_as_an_ordinary_forward_pass_scores_text_and_codes(
    settings: Callable[..., Config],
) -> None:
    run = prepare(settings(), "sft")
    assert run.traces is not None
    policy = model.create(run.config.model, run.tokenizer, seed=0)
    rows = np.array([5, 0])
    batch = pack_traces(run.train, run.traces, rows, run.tokenizer, VERSION)
    tags = run.tokenizer.think
    assert tags is not None
    teacher = learner(run, policy)
    with torch.no_grad():
        found, _ = choice_logprobs(policy, to_tensors(batch), run.tokenizer)
    at = 0
    for row in range(2):
        length = int((batch.subtree_end[row] > 0).sum())
        tokens = batch.token[row, :length]
        with torch.no_grad():
            logits = policy(torch.from_numpy(tokens[None].astype(np.int64))).logits[0]
        text = np.flatnonzero((batch.row == row) & (batch.state == SearchTrees.FREE_TEXT))
        assert (batch.chosen[text] == tokens[batch.query_slot[text] + 1]).all()
        assert (batch.chosen[text] == tags.close).sum() == 3
        assert not (batch.chosen[text] == tags.open).any()
        expected = logits.log_softmax(-1)[batch.query_slot[text], batch.chosen[text]]
        torch.testing.assert_close(found[torch.from_numpy(text)], expected, atol=1e-5, rtol=0)
        at += len(text)
    codes = batch.state != SearchTrees.FREE_TEXT
    target = run.tokenizer.token_of(torch.from_numpy(batch.chosen[codes]))
    assert target.tolist() == batch.token[batch.row[codes], batch.query_slot[codes] + 1].tolist()
    assert at + codes.sum() == len(batch.row)
    assert batch.advantage_pos.sum() == pytest.approx(1, rel=1e-5)
    assert teacher.sft_step(batch)["nll"] == pytest.approx(-float(found.mean()), rel=1e-4)


@pytest.mark.slow
def test_a_taught_policy_thinks_in_form_and_learns_from_its_own_thoughts(
    taught: tuple[Run, list[float]],
) -> None:
    run, losses = taught
    assert losses[-1] < losses[0] / 3
    rollout_worker = RolloutWorker(run.config.rollout, run.policy, run.tokenizer, seed=0)
    trees = rollout_worker.search(make_prompts(run.tokenizer, run.train, np.arange(8)), seed=0)
    counts = trees.cost.counts
    assert counts["thoughts"] == 32
    assert counts["malformed_thoughts"] == 0
    assert counts["cut_blocks"] < 16
    scored = add_step_rewards(score_trees(trees, run.catalog, {"rule": 1.0}), run.catalog)
    batch = make_batch(scored, run.tokenizer, run.config.learner)
    assert (batch.state == SearchTrees.FREE_TEXT).sum() > (batch.state != -1).sum() > 0
    student = learner(run, model.load(run.policy, run.tokenizer))
    metrics = student.rl_step(batch)
    assert metrics["logprob_gap"] < 1e-5
    assert metrics["flat_over_packed"] > 1
    shown = step_metrics(scored, Update(policy=trees.policy, metrics=metrics), lag=0)
    assert shown["rollout/cut_blocks"] == counts["cut_blocks"] / 8
    codes = run.catalog.codes[run.catalog.item_of_leaf[run.catalog.leaf_start[trees.leaf]]]
    alike = diversity(path=codes, start=trees.candidate_start)
    assert shown["rollout/diversity"] == pytest.approx(alike)
    assert {"rewards/match_1", "rewards/match_3", "rewards/step_signal_share"} <= set(shown)


def test_evaluation_with_and_without_thinking_ask_the_same_policy(
    taught: tuple[Run, list[float]],
) -> None:
    run, _ = taught
    rollout_worker = RolloutWorker(run.config.rollout, run.policy, run.tokenizer, seed=0)
    prompts = make_prompts(run.tokenizer, run.valid, np.arange(6))
    thinking, plain = rollout_worker.rank(prompts, 5, True), rollout_worker.rank(prompts, 5)
    assert np.diff(thinking.start).tolist() == np.diff(plain.start).tolist() == [5] * 6
    assert thinking.cost.counts["thoughts"] == 6
    assert not plain.cost.counts


def test_a_run_goes_on_with_the_tokenizer_it_was_made_with(
    settings: Callable[..., Config], taught: tuple[Run, list[float]]
) -> None:
    run, _ = taught
    again = prepare(settings(), "sft")
    assert again.text_tokenizer.get_vocab() == run.text_tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (["data.varying_depth=true"], "thoughts_of_varying_depth"),
        (["data.rationales=why"], "two_rationales"),
        (["model.value_head=true", "evaluate.engine=torch"], "values_of_thoughts"),
        (["rollout.search=beam", "learner.sapo.think_only=true"], "think_only_without_thoughts"),
    ],
)
def test_settings_that_cannot_think_are_refused(
    settings: Callable[..., Config], changes: list[str], code: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare(settings(*changes), "sft")
    assert refused.value.code == f"config.{code}"


def test_a_policy_without_tags_is_refused_before_anything_starts(
    settings: Callable[..., Config], data: Path, tmp_path: Path
) -> None:
    mute = settings(f"output={tmp_path}", "rollout.search=beam", "evaluate.think=false")
    mute = mute.model_copy(
        update={"data": mute.data.model_copy(update={"rationale_template": None})}
    )
    run = prepare(mute, "sft")
    open_run_dir(run)
    with pytest.raises(DataError, match="reads <think> as 1 tokens and has none for it"):
        prepare(settings(f"output={tmp_path}/other", f"model.path={run.policy}"), "train")


def test_the_shipped_run_is_valid() -> None:
    shipped = config.load(ROOT / "cluster" / "runs" / "sapo_tiny.toml")
    assert shipped.rollout.search == "think"
    assert shipped.learner.estimator == "sapo"
