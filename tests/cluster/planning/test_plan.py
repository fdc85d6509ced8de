"""Capacity plans: resources of a run, and settings that cannot work."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.cli import app as cli
from cluster.planning.plan import GIB, Machine, Sizes, Speed, layout, plan
from orchard import config
from orchard.settings import Config
from tests.fixtures.runs import TinyRun

SIZES = Sizes(
    parameters=10_000_000, hidden=256, inner=1024, layers=4, longest=4096,
    prompt_tokens=20.0, prompt_tokens_max=31, nodes_per_level=(8, 100, 500),
)  # fmt: skip
MACHINE = Machine(memory=64 * GIB, gpus=0, free_disk=100 * GIB)
SPEED = Speed(forward=1000.0, update=500.0)


def settings(**changes: Any) -> Config:
    tree: dict[str, Any] = {"name": "toy", "data": {"path": "data"}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return config.parse(tree)


def test_tokens_and_seconds_of_a_step_are_those_of_a_beam() -> None:
    capacity = plan(settings(learner__prompts_per_step=10), SIZES, MACHINE, SPEED)
    assert capacity.prefill_tokens == 200
    assert capacity.search_tokens == 10 * (8 + 16)  # the first level has eight nodes
    assert capacity.update_tokens == 200 + 240 + 160
    assert capacity.search_s == pytest.approx(440 / 1000)
    assert capacity.update_s == pytest.approx(600 / 500)
    shared = settings(learner__prompts_per_step=10, rollout__actors=2, learner__workers=4)
    halved = plan(shared, SIZES, MACHINE, SPEED)
    assert halved.search_s == pytest.approx(capacity.search_s / 2)
    assert halved.update_s == pytest.approx(capacity.update_s / 4)


def test_memory_counts_every_copy_of_the_weights() -> None:
    weights = 4 * SIZES.parameters

    def learner(**changes: Any) -> int:
        groups = {group.name: group for group in layout(settings(**changes), SIZES)}
        return groups["learner"].memory

    base = learner()
    # Weights, gradients, two moments, reference, and the copy that a checkpoint is written from.
    assert base > 8 * weights
    assert learner(learner__kl={"weight": 0.0}) == base - weights
    assert learner(learner__average=0.9) == base + 2 * weights
    rollout = {
        dtype: {r.name: r for r in layout(settings(rollout__dtype=dtype), SIZES)}["rollout"].memory
        for dtype in ("float32", "bfloat16")
    }
    assert rollout["float32"] - rollout["bfloat16"] == weights // 2


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "memory": ({"rollout__kv_cache_gib": 70.0}, {}, "lower rollout.kv_cache_gib"),
    "gpus": (
        {"learner__gpus": 1.0, "rollout__gpus": 0.5},
        {},
        "ask for 2 GPUs with the actor that evaluates, .* has 0",
    ),
    "cpus": ({"cluster__cpus": 2}, {}, "cluster.cpus = 2 is below the 5"),
    "workers": ({"learner__workers": 9, "learner__prompts_per_step": 8}, {}, "cannot share"),
    "disk": ({}, {"free_disk": 1000}, "lower checkpoint.keep"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_said_in_one_sentence(case: str) -> None:
    changes, lacking, message = REFUSED[case]
    machine = replace(MACHINE, **lacking)
    (refusal,) = plan(settings(**changes), SIZES, machine, SPEED).refusals
    assert re.search(message, refusal)
    assert plan(settings(), SIZES, MACHINE, SPEED).refusals == ()


def test_prompts_longer_than_the_policy_knows_are_refused() -> None:
    short = replace(SIZES, longest=33)
    (refusal,) = plan(settings(), short, MACHINE, SPEED).refusals
    assert "up to 34 tokens, the policy knows 33 positions; lower data.max_history" in refusal


def test_a_cluster_elsewhere_is_not_judged_by_this_machine() -> None:
    far = settings(cluster__address="auto", learner__gpus=8.0)
    assert plan(far, SIZES, MACHINE, SPEED).refusals == ()


def test_one_process_shares_one_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    here = settings(cluster__in_process=True, learner__gpus=1.0, rollout__gpus=1.0)
    assert plan(here, SIZES, replace(MACHINE, gpus=1), SPEED).refusals == ()
    (refusal,) = plan(here, SIZES, MACHINE, SPEED).refusals
    assert re.search("ask for 1 GPUs", refusal)


@pytest.fixture
def run_file(tiny_run: TinyRun) -> Path:
    return tiny_run(model={"value_head": True}, rollout={"engine": "torch"})


@pytest.mark.slow
def test_the_command_plans_without_starting_anything(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    connected = ray.is_initialized()  # by another test
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(run_file), "cluster.cpus=1", "learner.gpus=99"])
    assert ended.value.code == 2
    output, refused = capsys.readouterr()
    for part in ("60 items", "1 x rollout", "1 x learner", "memory in all", "parameters"):
        assert part in output
    assert config.parse(tomllib.loads(output)).name == "toy"  # facts are comments
    assert "cluster.cpus = 1" in refused
    assert "99 GPUs" in refused
    assert not (run_file.parent / "runs").exists()
    assert ray.is_initialized() == connected
