"""Complete runs on a tiny data set in one process, without Ray."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.report.examples import read_examples
from cluster.training.controller import Controller
from cluster.training.evaluate import evaluate, evaluation_file
from cluster.training.loop import train
from cluster.training.run import prepare
from cluster.training.sft import sft
from orchard.catalog.catalog import load
from orchard.evaluation.ranking import Evaluation, difference, read
from orchard.policy.store import PolicyFacts
from orchard.policy.titles import from_titles
from orchard.settings import Config
from orchard.testing import save_model_folder, tiny_policy, tiny_title_tokenizer
from orchard.tracking.metrics_log import read_metrics
from tests.fixtures.begun import in_a_controller, taught_and_improved, untrained, weights_of

Settings = Callable[..., Config]
pytestmark = pytest.mark.slow


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Return the settings of a run in one process, with dotted changes."""
    return lambda *changes: settings("cluster.in_process=true", *changes)


def test_the_warm_start_learns_and_leaves_its_best_policy(
    settings: Settings,
) -> None:
    run = prepare(settings(), "sft")
    last = in_a_controller(sft, run)
    log = read_metrics(run.dir / "metrics.jsonl")["sft"]
    assert last.step == 2
    assert log["sft/loss"].value[-1] < log["sft/loss"].value[0]
    assert log["evaluate/ndcg@10/sid"].step.tolist() == [1, 2]
    assert weights_of(run.result) != weights_of(run.policy)
    assert prepare(settings(), "train").policy == run.result


def test_training_runs_resumes_and_equals_an_undisturbed_twin(
    settings: Settings, tmp_path: Path
) -> None:
    twin = settings("name=twin")
    untrained(settings())
    untrained(twin)
    whole = in_a_controller(train, prepare(twin, "train"))

    first = in_a_controller(
        train, prepare(settings("learner.steps=4", "evaluate.every=0"), "train")
    )
    assert first.digest == whole.digest

    log = read_metrics(twin.run_dir / "metrics.jsonl")["train"]
    assert log["learner/surrogate"].step[-1] == 4
    # The gate: what the search recorded is what the learner computes, at the same version.
    assert float(np.max(log["learner/logprob_gap"].value)) < 1e-5
    assert set(log["rollout/lag_versions"].value) == {0.0}

    longer = in_a_controller(
        train, prepare(settings("learner.steps=6", "evaluate.every=0"), "train")
    )
    resumed = read_metrics(settings().run_dir / "metrics.jsonl")["train"]
    assert longer.step == 6
    assert resumed["learner/surrogate"].step.tolist() == [1, 2, 3, 4, 5, 6]


def test_an_average_is_what_is_judged_and_kept_while_rollouts_follow_the_newest(
    settings: Settings,
) -> None:
    changed = settings("learner.ema_decay=0.9", "learner.dropout=0.1")
    untrained(changed)
    run = prepare(changed, "train")
    newest = in_a_controller(train, run)
    log = read_metrics(run.dir / "metrics.jsonl")["train"]
    assert log["learner/logprob_gap"].value.max() < 1e-5
    assert weights_of(run.result) != newest.digest
    assert [len(one["candidate"]) for one in read_examples(run.dir)]


def test_titles_are_learnt_and_searched_with_the_same_probabilities(
    settings: Settings, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "titled")
    items = pq.read_table(data / "items.parquet").drop_columns(["sid", "title"])
    words = ["red pen", "red", "blue pen", "red pencil"]
    titles = [f"{words[i % 4]}{' abcdefghij'[i // 4 % 11]}".strip() for i in range(len(items))]
    pq.write_table(
        items.append_column("title", pa.array(titles)), tmp_path / "titled/items.parquet"
    )
    tokenizer = tiny_title_tokenizer()
    policy, _ = tiny_policy(from_titles(titles, tokenizer), tokenizer=tokenizer)
    save_model_folder(policy, tokenizer, tmp_path / "text")
    begin = prepare(
        settings(
            "data.titles=true", f"data.path={tmp_path / 'titled'}",
            f"model.path={tmp_path / 'text'}", "sft.epochs=1", "learner.steps=2",
        ),
        "sft",
    )  # fmt: skip

    assert in_a_controller(taught_and_improved, begin).step == 2
    log = read_metrics(begin.dir / "metrics.jsonl")["train"]
    assert float(np.max(log["learner/logprob_gap"].value)) < 1e-5
    assert load(begin.dir / "policy" / "catalogue").digest == begin.catalog.digest


def test_a_run_is_the_same_whether_weights_or_adapters_travel_and_near_it_where_they_are_rounded(
    settings: Settings,
) -> None:
    logs, kept = dict[str, dict[str, list[float]]](), dict[str, str]()
    for form in ("float32", "adapter", "bfloat16"):
        changes = ("model.lora={rank=4}", "learner={steps=2,prompts_per_step=8,lr=5e-3}")
        config = settings(f"name={form}", f"cluster.publish_format={form}", *changes)
        untrained(config)
        run = prepare(config, "train")
        assert in_a_controller(train, run).step == 2
        metrics = read_metrics(run.dir / "metrics.jsonl")["train"]
        logs[form] = {
            name: column.value.tolist()
            for name, column in metrics.items()
            if not name.endswith(("_s", "seconds")) and "bytes" not in name
        }
        kept[form] = weights_of(run.dir / "policy")
        assert PolicyFacts.read(run.dir / "policy").version.digest == kept[form]
    assert logs["adapter"] == logs["float32"]
    assert kept["adapter"] == kept["float32"]
    gap = max(logs["bfloat16"]["learner/logprob_gap"])
    assert max(logs["float32"]["learner/logprob_gap"]) < 1e-5 < gap < 0.5


def test_a_policy_is_taught_to_think_and_improved_by_its_own_thoughts(
    settings: Settings,
) -> None:
    changes = (
        'data.rationale_template="seen {seen}, next {next}"',
        "rollout.search=think",
        "rollout.think.block_tokens=24",
        "evaluate.think=true",
        "learner.estimator=sapo",
        "learner.steps=2",
        "sft.epochs=1",
    )
    begin = prepare(settings(*changes), "sft")

    async def command(controller: Controller) -> None:
        await taught_and_improved(controller)

    in_a_controller(command, begin)
    log = read_metrics(begin.dir / "metrics.jsonl")
    assert log["sft"]["evaluate/thoughts"].value[-1] == 40
    assert float(np.max(log["train"]["learner/logprob_gap"].value)) < 1e-5
    assert log["train"]["rollout/thoughts"].value.tolist() == [6, 6]
    assert log["train"]["rewards/match_1"].step.tolist() == [1, 2]


def test_an_evaluation_covers_every_row_and_pairs_with_another(
    settings: Settings,
) -> None:
    untrained(settings())
    run = prepare(settings(), "evaluate")

    async def both(controller: Controller) -> tuple[Evaluation, Evaluation]:
        first = await evaluate(controller, run.policy, split="test", beams=10, name="first")
        (run.policy / "policy.json").unlink()  # as in a folder that others have made
        wider = await evaluate(controller, run.policy, split="test", beams=12, name="second")
        return first["first"], wider["second"]

    found, again = in_a_controller(both, run)
    assert found.num_rows == len(run.test)
    assert "hr@20/sid" not in found.metrics
    # The same policy under a wider beam: what was found stays found, at the same rank.
    change = difference(again, found)["hr@1/sid"]
    assert (change.mean, change.low, change.high) == (0, 0, 0)
    assert read(evaluation_file(run, "first")).metrics == found.metrics
