"""Complete runs on a tiny data set, with real Ray actors and a real Ray Train worker group."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import ray

from cluster.training.controller import Controller, start_controller
from cluster.training.evaluate import evaluate
from cluster.training.loop import train
from cluster.training.run import Run, prepare
from cluster.training.run_dir import saved_policy
from orchard.evaluation.ranking import Evaluation
from orchard.policy import model, transfer
from orchard.policy.store import read_adapter
from orchard.policy.weights import snapshot
from orchard.settings import Config
from orchard.tracking.metrics_log import read_metrics
from orchard.types import PolicyVersion
from tests.fixtures.begun import in_a_controller, taught_and_improved, untrained, weights_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


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
