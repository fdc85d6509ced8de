"""Complete runs on a tiny data set, with real Ray actors and a real Ray Train worker group."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from cluster.report.examples import read_examples
from cluster.training.controller import Controller, start_controller
from cluster.training.evaluate import evaluate
from cluster.training.loop import train
from cluster.training.run import Run, prepare
from cluster.training.run_dir import saved_policy
from cluster.training.sft import sft
from orchard.catalog.catalog import load
from orchard.evaluation.ranking import Evaluation
from orchard.policy import model, transfer
from orchard.policy.store import PolicyFacts, read_adapter
from orchard.policy.titles import from_titles
from orchard.policy.weights import digest, snapshot
from orchard.settings import Config
from orchard.testing import save_model_folder, tiny_policy, tiny_title_tokenizer
from orchard.tracking.metrics_log import read_metrics
from orchard.types import PolicyVersion
from tests.fixtures.begun import in_a_controller, untrained

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


async def taught_and_improved(controller: Controller) -> PolicyVersion:
    """Run SFT, then RL from its policy, and return the last version."""
    begin = controller.run
    await sft(controller)
    await controller.start_phase(begin.with_phase("train", begin.result))
    return await train(controller)


def weights_of(folder: Path) -> str:
    return digest(snapshot(model.load(folder)))


def test_the_warm_start_learns_and_leaves_its_best_policy(
    settings: Callable[..., Config],
) -> None:
    run = prepare(settings(), "sft")
    last = in_a_controller(sft, run)
    log = read_metrics(run.dir / "metrics.jsonl")["sft"]
    assert last.step == 2
    assert log["sft/loss"].value[-1] < log["sft/loss"].value[0]
    assert log["evaluate/ndcg@10/sid"].step.tolist() == [1, 2]
    assert weights_of(run.result) != weights_of(run.policy)
    assert prepare(settings(), "train").policy == run.result


@pytest.mark.nightly
def test_training_runs_resumes_and_equals_an_undisturbed_twin(
    settings: Callable[..., Config], tmp_path: Path
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


@pytest.mark.nightly
def test_an_average_is_what_is_judged_and_kept_while_rollouts_follow_the_newest(
    settings: Callable[..., Config],
) -> None:
    changed = settings("learner.ema_decay=0.9", "learner.dropout=0.1")
    untrained(changed)
    run = prepare(changed, "train")
    newest = in_a_controller(train, run)
    log = read_metrics(run.dir / "metrics.jsonl")["train"]
    assert log["learner/logprob_gap"].value.max() < 1e-5
    assert weights_of(run.result) != newest.digest
    assert [len(one["candidate"]) for one in read_examples(run.dir)]


@pytest.mark.vllm
def test_vllm_rollouts_record_what_the_learner_computes_after_every_push(
    settings: Callable[..., Config],
) -> None:
    changes = ("rollout.engine=vllm", "rollout.kv_cache_gib=0.125", "learner.steps=3")
    untrained(settings(*changes))
    run = prepare(settings(*changes), "train")
    in_a_controller(train, run)
    log = read_metrics(run.dir / "metrics.jsonl")["train"]
    assert len(log["learner/logprob_gap"].value) == 3
    assert float(np.max(log["learner/logprob_gap"].value)) < 1e-4


def test_a_rollout_actor_killed_in_the_middle_of_a_step_costs_nothing(
    settings: Callable[..., Config],
) -> None:
    untrained(settings())
    run = prepare(settings("rollout.actors=2"), "train")

    async def scenario(run: Run) -> None:
        async with start_controller(run) as controller:
            first = PolicyVersion(step=0, digest=weights_of(run.policy))
            await controller.sync_weights(first, snapshot(model.load(run.policy)))
            assert controller.rollout is not None
            calm = await controller.scored_trees(0)
            disturbed = asyncio.ensure_future(controller.scored_trees(0))
            await asyncio.sleep(0)
            ray.kill(controller.rollout.actors[0])
            after = await disturbed
            assert controller.rollout.restarts == 1
            assert after.trees.prompts.id.tolist() == calm.trees.prompts.id.tolist()
            assert after.trees.leaf.tolist() == calm.trees.leaf.tolist()
            np.testing.assert_array_equal(after.reward, calm.reward)

    asyncio.run(scenario(run))


def test_titles_are_learnt_and_searched_with_the_same_probabilities(
    settings: Callable[..., Config], data: Path, tmp_path: Path
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


@pytest.mark.nightly
@pytest.mark.vllm
def test_a_text_model_is_taught_and_improved_through_adapters_with_vllm(
    settings: Callable[..., Config],
) -> None:
    begin = prepare(
        settings(
            "prompt.history='Bought: {history}. Next: '", "prompt.titles='Titles: {history}. '",
            "model.text_tokens=400", "model.hidden_size=64", "model.lora={rank=4}",
            "sft.epochs=1", "sft.tasks={titles=0.5}", "learner.steps=2", "rollout.engine=vllm",
            "rollout.kv_cache_gib=0.125", "cluster.publish_format=adapter",
        ),
        "sft",
    )  # fmt: skip

    assert in_a_controller(taught_and_improved, begin).step == 2
    log = read_metrics(begin.dir / "metrics.jsonl")["train"]
    assert float(np.max(log["learner/logprob_gap"].value)) < 1e-4
    trained = snapshot(model.load(begin.dir / "policy"))
    assert not [name for name in trained if "lora" in name or "base_layer" in name]
    base, adapter = snapshot(model.load(begin.dir / "scratch")), read_adapter(begin.dir / "policy")
    adapted = [name.removesuffix(".lora_B.weight") for name in adapter if ".lora_B." in name]
    assert adapted
    for name in adapted:  # what both phases have added, whatever the best update was
        up, down = adapter[f"{name}.lora_B.weight"], adapter[f"{name}.lora_A.weight"]
        assert up.shape[1] == 8
        merged = base[f"{name}.weight"] + up @ down
        np.testing.assert_allclose(merged, trained[f"{name}.weight"], atol=1e-6)


@pytest.mark.nightly
def test_a_run_is_the_same_whether_weights_or_adapters_travel_and_near_it_where_they_are_rounded(
    settings: Callable[..., Config],
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


def test_rollouts_run_ahead_as_far_as_the_bound_and_no_further(
    settings: Callable[..., Config],
) -> None:
    changes = (
        "cluster.max_off_policy_steps=2",
        "rollout.batch_size=16",
        "learner.steps=6",
        "evaluate.every=0",
    )
    untrained(settings(*changes))
    run = prepare(settings(*changes), "train")
    assert in_a_controller(train, run).step == 6
    log = read_metrics(run.dir / "metrics.jsonl")["train"]
    lag = log["rollout/lag_versions"]
    assert lag.step.tolist() == [1, 2, 3, 4, 5, 6]
    # The searches of three steps are sent off before the first update can be published.
    assert lag.value[:3].tolist() == [0, 1, 2]
    assert lag.value.max() == 2


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.nightly), "fsdp"])
def test_two_workers_train_like_one(settings: Callable[..., Config], parallel: str) -> None:
    one = settings("name=one")
    two = settings("name=two", "learner.workers=2", f"learner.parallel={parallel}")
    for each in (one, two):
        untrained(each)
        in_a_controller(train, prepare(each, "train"))
    logs = [read_metrics(each.run_dir / "metrics.jsonl")["train"] for each in (one, two)]
    for name in ("learner/surrogate", "learner/grad_norm", "rewards/mean"):
        np.testing.assert_allclose(logs[0][name].value, logs[1][name].value, rtol=1e-3, atol=1e-5)


@pytest.mark.nightly
def test_a_policy_is_taught_to_think_and_improved_by_its_own_thoughts(
    settings: Callable[..., Config],
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


def test_one_controller_serves_every_phase_of_a_command(settings: Callable[..., Config]) -> None:
    begin = prepare(settings("sft.epochs=1", "learner.steps=2"), "sft")

    async def command(controller: Controller) -> tuple[Evaluation, PolicyVersion]:
        await taught_and_improved(controller)
        assert controller.rollout is not None
        searched = controller.rollout.actors[0]
        trained = begin.dir / "policy"
        await controller.start_phase(begin.with_phase("evaluate", trained))
        assert controller.rollout is None
        found = await evaluate(controller, trained, split="test", beams=10, name="trained")
        return found["trained"], await asyncio.wrap_future(searched.version.remote().future())

    found, held = in_a_controller(command, begin)
    alone = prepare(
        settings("sft.epochs=1", "learner.steps=2"), "evaluate", policy=begin.dir / "policy"
    )

    async def again(controller: Controller) -> Evaluation:
        found = await evaluate(controller, alone.policy, split="test", beams=10, name="alone")
        return found["alone"]

    saved, weights = saved_policy(alone, alone.policy)
    assert found.policy == str(saved)
    # The actor that searched for the training also searched for the evaluation.
    assert held.digest == transfer.digest(transfer.pack(dict(weights)))
    assert in_a_controller(again, alone).ranks.sid.tolist() == found.ranks.sid.tolist()
