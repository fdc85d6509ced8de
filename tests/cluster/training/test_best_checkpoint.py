"""The best checkpoint of a phase and its evaluation, without Ray."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.actors.backend import IN_PROCESS
from cluster.actors.pool import Pool
from cluster.actors.weights import PublishedWeights
from cluster.training.best_checkpoint import SCORE, BestCheckpoint
from cluster.training.controller import Controller
from cluster.training.evaluate import evaluate_split, evaluation_file
from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir, save_policy
from orchard import config
from orchard.data.prompts import read_split
from orchard.errors import RunInterrupted
from orchard.evaluation import ranking
from orchard.evaluation.ranking import Evaluation
from orchard.policy import model
from orchard.policy.store import GUIDE, PolicyFacts
from orchard.policy.weights import Weights, digest, snapshot
from orchard.types import PolicyVersion, Prompts, Update
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from tests.fixtures.guides import random_guide


class Here:
    """Fake pool of one worker in this process."""

    name = "ranking"

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine

    async def call(self, method: str, prompts: Prompts, beams: int, *_: object) -> Candidates:
        assert method == "rank"
        return beam(self.engine, prompts, width=beams)


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Run:
    path = tmp_path / "toy.toml"
    path.write_text(
        f"""
        name = "toy"
        output = "{tmp_path / "runs"}"
        data.path = "{data}"
        model = {{hidden_size = 16, intermediate_size = 32, layers = 1, heads = 2, kv_heads = 1}}
        evaluate = {{beams = 10, batch_size = 8, test_rows = 20}}
        """
    )
    prepared = prepare(config.load(path), "sft")
    open_run_dir(prepared)
    return prepared


@pytest.fixture
def controller(run: Run) -> Controller:
    """Controller that evaluates in this process, with any requested policy."""
    policy = model.create(run.config.model, run.tokenizer, seed=0)
    version = PolicyVersion(step=0, digest=digest(snapshot(policy)))
    save_policy(run, run.result, version, snapshot(policy), valid_score=0.5, valid_rows=8.0)
    pool: Any = Here(TorchEngine(policy, run.tokenizer, version))
    made = Controller.__new__(Controller)
    made.run = run.with_phase("evaluate", run.result)
    made._backend = IN_PROCESS  # pyright: ignore[reportPrivateUsage]
    made.stopping = asyncio.Event()
    made.ranking = pool
    held: dict[Pool, PublishedWeights] = {pool: PublishedWeights(policy=version)}
    made._published = held  # pyright: ignore[reportPrivateUsage]
    return made


def test_a_signal_ends_an_evaluation_and_leaves_nothing_half(controller: Controller) -> None:
    controller.stopping.set()
    with pytest.raises(RunInterrupted, match="stopped while evaluating; the same command resumes"):
        asyncio.run(evaluate_split(controller, controller.run.policy, "warm_start"))
    assert not evaluation_file(controller.run, "warm_start").exists()


def test_an_evaluation_is_done_again_where_other_rows_are_asked_for(controller: Controller) -> None:
    first = asyncio.run(evaluate_split(controller, controller.run.policy, "warm_start"))
    assert (
        asyncio.run(evaluate_split(controller, controller.run.policy, "warm_start")).seconds
        == first.seconds
    )
    assert first.num_rows == 20
    settings = controller.run.config
    fewer = settings.evaluate.model_copy(update={"test_rows": 12})
    controller.run = replace(controller.run, config=settings.model_copy(update={"evaluate": fewer}))
    assert (
        asyncio.run(evaluate_split(controller, controller.run.policy, "warm_start")).num_rows == 12
    )
    assert ranking.read(evaluation_file(controller.run, "warm_start")).num_rows == 12


@pytest.mark.parametrize(
    ("num_rows", "score", "best", "asked"),
    [(8, 0.3, 0.5, 0), (4, 0.3, 0.3, 1), (0, 0.3, 7.0, 0)],
    ids=["as before", "on fewer rows", "on none"],
)
def test_a_best_checkpoint_judged_otherwise_is_judged_again(
    controller: Controller, monkeypatch: pytest.MonkeyPatch, num_rows: int, score: float, best:
    float, asked: int,
) -> None:  # fmt: skip
    run, calls = controller.run, list[int]()
    policy = snapshot(model.load(run.policy))
    facts = {"valid_score": 0.5, "valid_rows": 8.0, "valid_beams": 10.0}
    save_policy(run, run.result, PolicyVersion(step=7, digest=digest(policy)), policy, **facts)

    async def judged(_: object, rows: np.ndarray, **__: object) -> Evaluation:
        calls.append(len(rows))
        metrics: Mapping[str, Any] = {SCORE: SimpleNamespace(mean=score)}
        found: Any = SimpleNamespace(metrics=metrics, extra={})
        return found

    monkeypatch.setattr(controller, "evaluate", judged)
    best_checkpoint = asyncio.run(BestCheckpoint.open(controller, num_rows=num_rows, beams=10))
    assert best_checkpoint.best == best
    assert len(calls) == asked

    async def kept(version: PolicyVersion, weights: Weights) -> None:
        update = Update(policy=version, metrics={}, weights=weights)
        await best_checkpoint.evaluate_and_keep(update)

    asyncio.run(kept(PolicyVersion(step=6, digest=digest(policy)), policy))
    assert PolicyFacts.read(run.result).version.step == 7  # no better than it, by the new measure
    assert PolicyFacts.read(run.result).measurements["valid_score"] == 0.5


@pytest.mark.slow
def test_an_evaluation_is_done_again_where_the_test_file_or_the_policy_has_changed(
    controller: Controller, data: Path, tmp_path: Path
) -> None:
    path = evaluation_file(controller.run, "warm_start")

    def evaluated() -> tuple[Evaluation, int]:
        found = asyncio.run(evaluate_split(controller, controller.run.policy, "warm_start"))
        return found, path.stat().st_mtime_ns

    first, written = evaluated()
    assert evaluated()[1] == written
    before, test = controller.run, controller.run.test
    rows = pq.read_table(data / "test.parquet")
    at = rows.column_names.index("target")
    pq.write_table(rows.set_column(at, "target", rows["target"][::-1]), tmp_path / "other.parquet")
    swapped = read_split([tmp_path / "other.parquet"], before.catalog, max_history=10)
    assert len(swapped) == len(test)
    controller.run = replace(before, test=swapped)
    assert evaluated()[0].split == swapped.digest != first.split
    controller.run = before
    again, written = evaluated()
    assert again.split == first.split
    # Another policy of the same step.
    policy = controller.run.policy
    other = {name: array * 2 for name, array in snapshot(model.load(policy)).items()}
    step = PolicyFacts.read(policy).version.step
    version = PolicyVersion(step=step, digest=digest(other))
    save_policy(controller.run, policy, version, other)
    held = {controller.ranking: PublishedWeights(policy=version)}
    controller._published = held  # pyright: ignore
    assert evaluated()[1] > written
    path.with_suffix(".parquet").write_bytes(b"")  # as a full disk leaves it
    assert evaluated()[0].split == first.split


@pytest.mark.slow
def test_an_evaluation_is_done_again_where_its_further_lists_are_missing_or_old(
    controller: Controller,
) -> None:
    run = controller.run
    lists = run.config.evaluate.model_copy(update={"exclude_seen": True})
    controller.run = replace(run, config=run.config.model_copy(update={"evaluate": lists}))
    random_guide(run.catalog, seed=0).save(run.policy / GUIDE)

    def evaluated() -> dict[str, int]:
        asyncio.run(evaluate_split(controller, run.policy, "warm_start"))
        names = ("warm_start", "warm_start_unseen", "warm_start_guided")
        return {name: evaluation_file(run, name).stat().st_mtime_ns for name in names}

    written = evaluated()
    assert evaluated() == written
    for name in ("warm_start_unseen", "warm_start_guided"):
        path = evaluation_file(run, name)
        path.unlink()
        again = evaluated()
        assert all(again[each] > written[each] for each in written)
        written = again
        ranking.write(replace(ranking.read(path), policy="7-other"), path)
        written = evaluated()
        assert all(written[each] > again[each] for each in written)
    unseen = evaluation_file(run, "warm_start_unseen")
    ranking.write(replace(ranking.read(unseen), seconds=-1.0), unseen)  # of an earlier search
    assert evaluated()["warm_start"] > written["warm_start"]
    written = evaluated()
    random_guide(run.catalog, seed=1).save(run.policy / GUIDE)
    again = evaluated()
    assert again["warm_start_guided"] > written["warm_start_guided"]
    assert evaluated() == again


def test_a_best_checkpoint_of_another_validation_file_is_judged_again(
    controller: Controller, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = controller.run
    facts = {"valid_score": 0.5, "valid_rows": 8.0, "valid_beams": 10.0}
    policy = snapshot(model.load(run.policy))
    save_policy(run, run.result, PolicyVersion(step=7, digest=digest(policy)), policy, **facts)
    assert PolicyFacts.read(run.result).data["valid"] == run.valid.digest

    async def judged(*_: object, **__: object) -> Evaluation:
        metrics: Mapping[str, Any] = {SCORE: SimpleNamespace(mean=0.25)}
        found: Any = SimpleNamespace(metrics=metrics, extra={})
        return found

    monkeypatch.setattr(controller, "evaluate", judged)
    assert asyncio.run(BestCheckpoint.open(controller, num_rows=8, beams=10)).best == 0.5
    other = read_split([data / "test.parquet"], run.catalog, max_history=10)
    controller.run = replace(run, valid=other)
    assert asyncio.run(BestCheckpoint.open(controller, num_rows=8, beams=10)).best == 0.25
