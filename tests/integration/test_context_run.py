"""Runs whose prompts have context, from the columns of the splits to the endpoint."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import orchard
from cluster.training.controller import Controller
from cluster.training.evaluate import evaluate
from cluster.training.run import prepare
from cluster.training.run_dir import open_run_dir
from cluster.training.sft import sft
from orchard.data.prompts import make_prompts
from orchard.errors import ConfigError, DataError
from orchard.evaluation.ranking import Evaluation
from orchard.policy import model
from orchard.policy.store import open_tokenizer
from orchard.settings import Config
from orchard.tracking.metrics_log import read_metrics
from serve.service import Service
from tests.fixtures.begun import in_a_controller, taught_and_improved
from tests.fixtures.endpoint import recommend, served

Settings = Callable[..., Config]
pytestmark = pytest.mark.slow
TEXT = ('prompt.history="Bought: {history}. Next is "', "sft.tasks.titles=0.5")


@pytest.fixture
def settings(settings: Settings, data: Path, tmp_path: Path) -> Settings:
    """Return the settings of a run in one process on data with context, with dotted changes."""
    shutil.copytree(data, tmp_path / "context")
    for part in ("train", "valid", "test"):
        path = tmp_path / "context" / f"{part}.parquet"
        table, draw = pq.read_table(path), np.random.default_rng(0)
        behavior = [
            draw.choice(["buy", "view"], size=len(row)).tolist()
            for row in table["history"].to_pylist()
        ]
        country = draw.choice(["de", "fr"], size=len(table)).tolist()
        table = table.append_column("history_behavior", pa.array(behavior))
        pq.write_table(table.append_column("country", pa.array(country)), path)
    return lambda *changes: settings(
        "cluster.in_process=true", f"data.path={tmp_path / 'context'}", *changes
    )


WITH = 'data.context=["behavior", "country"]'


@pytest.mark.parametrize("kind", [(), TEXT], ids=["compact", "text"])
def test_a_run_learns_searches_and_serves_with_the_same_prompts(
    settings: Settings, kind: tuple[str, ...]
) -> None:
    changed = settings(WITH, "sft.epochs=1", "learner.steps=2", "evaluate.test_rows=20", *kind)
    run = prepare(changed, "sft")

    assert in_a_controller(taught_and_improved, run).step == 2
    log = read_metrics(run.dir / "metrics.jsonl")["train"]
    assert float(np.max(log["learner/logprob_gap"].value)) < 1e-5

    trained = run.dir / "policy"
    assert open_tokenizer(trained).context == run.tokenizer.context
    history, given = [3, 1], {"behavior": ["buy", "view"], "country": "fr"}
    local = orchard.load(trained)
    told = local.score(history, [0, 1, 2], context=given)
    assert not np.allclose(told, local.score(history, [0, 1, 2]))
    with pytest.raises(DataError, match="a list of 2 values"):
        local.recommend(history, context={"behavior": ["buy"]})

    async def ask(client: httpx.AsyncClient, service: Service) -> None:
        answer = await recommend(client, history=history, k=3, context=given)
        expected = local.recommend(history, 3, context=given)
        found = [(item["item_id"], item["score"]) for item in answer["items"]]
        assert [item_id for item_id, _ in found] == [item.item_id for item in expected]
        scores = [item.score for item in expected]
        assert np.allclose([score for _, score in found], scores, atol=1e-5)  # type: ignore[arg-type]
        body = {"history": history, "items": [0, 1, 2], "context": given}
        scored = (await client.post("/v1/score", json=body)).json()
        assert np.allclose([item["score"] for item in scored["items"]], told, atol=1e-4)
        info = (await client.get("/v1/policy")).json()["variants"][0]
        assert info["context"] == {"behavior": ["buy", "view"], "country": ["de", "fr"]}
        refused = await client.post("/v1/recommend", json={"history": history, "context": {"x": 1}})
        assert refused.status_code == 422
        assert "behavior, country" in refused.json()["detail"]

    nothing = {"attributes": None, "popularity": None, "histories": None, "filters": {}}
    served(trained, ask, **nothing)


def test_an_evaluation_reads_the_context_of_its_rows(settings: Settings) -> None:
    run = prepare(settings(WITH, "sft.epochs=1", "evaluate.exclude_seen=false"), "sft")

    async def work(controller: Controller) -> dict[str, Evaluation]:
        await sft(controller)
        begun, found = run.with_phase("evaluate", run.result), dict[str, Evaluation]()
        for name, each in (("told", begun), ("bare", replace(begun, test=bare))):
            await controller.start_phase(each)
            found |= await evaluate(controller, run.result, split="test", beams=8, name=name)
        return found

    bare = replace(run.test, context=None)
    found = in_a_controller(work, run)
    assert found["told"].split == found["bare"].split
    assert found["told"].search["data.context"] == "behavior, country"
    assert (found["told"].ranks.sid != found["bare"].ranks.sid).any()


def test_a_policy_without_context_goes_on_with_it_and_keeps_what_it_knew(
    settings: Settings,
) -> None:
    first = prepare(settings("sft.epochs=1"), "sft")
    in_a_controller(sft, first)
    with pytest.raises(ConfigError, match="no tokens for any context"):
        prepare(settings(WITH, "name=other", f"model.path={first.result}"), "train")
    second = prepare(settings(WITH, "name=second", f"model.path={first.result}"), "sft")
    open_run_dir(second)
    before, after = model.load(first.result), model.load(second.policy, second.tokenizer)
    known = model.head_weight(before)
    assert second.tokenizer.size == len(known) + 6
    assert (model.head_weight(after)[: len(known)] == known).all()
    with pytest.raises(ConfigError, match="trained with"):
        prepare(settings("name=third", f"model.path={second.policy}"), "sft")


def test_without_the_setting_prompts_are_those_of_data_without_the_columns(
    settings: Settings, data: Path
) -> None:
    rows = np.arange(20)
    bare = prepare(settings(f"data.path={data}"), "sft")
    plain = prepare(settings(), "sft")
    told = make_prompts(plain.tokenizer, plain.train, rows)
    assert told.token.tolist() == make_prompts(bare.tokenizer, bare.train, rows).token.tolist()
    assert plain.data == bare.data
    assert plain.tokenizer.size == bare.tokenizer.size
