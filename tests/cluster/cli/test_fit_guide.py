"""A guide from its command to the searches that it guides, without Ray."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import app as cli
from cluster.training.evaluate import excludes_seen, guide_to_evaluate, without_seen
from cluster.training.run import Run, prepare
from cluster.training.run_dir import save_policy, saved_policy
from orchard import config, ragged
from orchard.data.prompts import make_prompts
from orchard.data.synthetic import write_world
from orchard.errors import ConfigError
from orchard.policy.store import open_guide
from rollout.actor import RolloutWorker
from tests.fixtures.begun import untrained
from tests.fixtures.runs import TINY_WORLD


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "data"
    write_world(folder, TINY_WORLD)
    return folder


@pytest.fixture
def file(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        name = "toy"
        output = "{tmp_path / "runs"}"
        data.path = "{data}"
        model = {{hidden_size = 16, heads = 2, kv_heads = 1, intermediate_size = 16, layers = 1}}
        guide = {{rows = 40, beams = 60}}
        [rollout]
        engine = "torch"
        group_size = 6
        threads = 1
        guide = "expert"
        """
    )
    untrained(config.load(path))
    return path


def worker(run: Run) -> RolloutWorker:
    given = (run.config.rollout, run.policy, run.tokenizer, 0)
    return RolloutWorker(*given, run.critic, run.guide)


@pytest.mark.slow
def test_a_fitted_guide_guides_rollouts_and_evaluations(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config.load(file)
    with pytest.raises(ConfigError, match="holds no guide.*orchard fit guide"):
        prepare(settings, "train")
    cli.main(["fit", "guide", str(file)])
    out = capsys.readouterr().out
    assert "transitions / 0.001" in out
    assert "of the training targets are in their own history" in out
    run = prepare(settings, "train")
    assert run.guide is not None
    prompts = make_prompts(run.tokenizer, run.test, np.arange(8))
    trees = worker(run).search(prompts, seed=0)
    assert 0 <= trees.cost.counts["proved"] <= 8
    prompt = ragged.row_of(trees.candidate_start)
    key = trees.score + run.guide.reward(prompts, prompt, trees.leaf)
    for rows in np.split(key, trees.candidate_start[1:-1]):
        assert (np.diff(rows) <= 1e-5).all()  # best first by log p + r
    plain = worker(run).rank(prompts, 20)
    guided = worker(run).rank(prompts, 20, False, run.guide, True)
    assert plain.proved is None
    assert guided.proved is not None
    seen = ragged.row_of(prompts.history_start) * 1000 + run.catalog.leaf_of_item[prompts.history]
    assert not np.isin(ragged.row_of(guided.start) * 1000 + guided.leaf, seen).any()
    wide = worker(run).rank(prompts, 12, False, run.guide, False, 60)
    assert wide.proved is not None
    assert wide.proved.all()


@pytest.mark.slow
def test_a_policy_of_the_run_carries_its_guide_along(file: Path) -> None:
    cli.main(["fit", "guide", str(file)])
    run = prepare(config.load(file), "train")
    version, weights = saved_policy(run, run.policy)
    save_policy(run, run.result, replace(version, step=3), weights)
    carried = open_guide(run.result, run.catalog)
    assert carried is not None
    assert run.guide is not None
    assert carried.digest == run.guide.digest


@pytest.mark.slow
def test_evaluations_use_the_guide_of_the_policy_and_say_what_it_was_fitted_for(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = prepare(config.load(file), "evaluate")
    version, _ = saved_policy(run, run.policy)
    assert guide_to_evaluate(run, run.policy, version) is None
    asked = replace(run, config=config.load(file, ["evaluate.guide=true"]))
    with pytest.raises(ConfigError, match=r"evaluate\.guide = true, and .* holds no guide"):
        guide_to_evaluate(asked, run.policy, version)
    cli.main(["fit", "guide", str(file)])
    assert guide_to_evaluate(run, run.policy, version) is not None
    assert not caplog.records
    other = replace(version, digest="0" * 64)
    assert guide_to_evaluate(run, run.policy, other) is not None
    assert "fitted with the policy" in caplog.text
    off = replace(run, config=config.load(file, ["evaluate.guide=false"]))
    assert guide_to_evaluate(off, run.policy, version) is None


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_history_is_left_out_where_training_targets_do_not_repeat(
    file: Path, rate: float
) -> None:
    run = prepare(config.load(file), "evaluate")
    train = run.train
    target = train.target.copy()
    first = train.history[train.history_start[:-1]]
    repeats = np.arange(len(train)) < rate * len(train)
    fresh = np.setdiff1d(np.arange(len(run.catalog)), train.history)
    target = np.where(repeats, first, fresh[0] if len(fresh) else target)
    if not len(fresh):
        pytest.skip("every item is in some history")
    run = replace(run, train=replace(train, target=target))
    assert excludes_seen(run, None) == (rate == 0.0)
    always = replace(run, config=config.load(file, ["evaluate.exclude_seen=true"]))
    never = replace(run, config=config.load(file, ["evaluate.exclude_seen=false"]))
    assert excludes_seen(always, None)
    assert not excludes_seen(never, None)


def test_lists_without_the_history_are_the_same_lists_less_its_leaves(file: Path) -> None:
    run = prepare(config.load(file, ["rollout.guide=none"]), "evaluate")
    rows = np.arange(10)
    found = worker(run).rank(make_prompts(run.tokenizer, run.test, rows), 20)
    unseen = without_seen(run, run.test, rows, found)
    dropped = 0
    for b in rows:
        items = slice(*run.test.history_start[b : b + 2])
        seen = set(run.catalog.leaf_of_item[run.test.history[items]].tolist())
        before = found.leaf[found.start[b] : found.start[b + 1]].tolist()
        wanted = [leaf for leaf in before if leaf not in seen]
        assert unseen.leaf[unseen.start[b] : unseen.start[b + 1]].tolist() == wanted
        dropped += len(before) - len(wanted)
    assert dropped > 0


def test_a_policy_to_fit_for_is_only_for_guides(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "critic", str(file), "--policy", str(file.parent)])
    assert "does not apply to critic" in capsys.readouterr().err
