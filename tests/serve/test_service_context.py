"""Requests with context: what the policy reads, what is refused, and what is logged of them."""

from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest

from orchard.context import ContextColumn, add_context
from orchard.errors import ConfigError
from orchard.policy.item_tokenizer import ItemTokenizer, compact_tokenizer
from orchard.policy.store import Policy, PolicyFacts
from orchard.settings import VariantConfig
from orchard.testing import brute_force, tiny_catalog, tiny_policy
from orchard.types import PolicyVersion
from serve.service import Service
from tests.fixtures.endpoint import recommend, served, shown

ITEMS = tiny_catalog(level_size=(5, 4, 6), num_items=40)
BEHAVIOR = ContextColumn(name="behavior", per_event=True, values=("buy", "view"))
BARE = {"attributes": None, "popularity": None, "histories": None, "filters": {}}
HISTORY = [3, 17]


def save(folder: Path, *columns: ContextColumn) -> ItemTokenizer:
    """Write a random policy that reads some context; return its item tokenizer."""
    text_tokenizer = compact_tokenizer(ITEMS)
    add_context(text_tokenizer, columns)
    network, tokenizer = tiny_policy(ITEMS, tokenizer=text_tokenizer)
    Policy(
        version=PolicyVersion(step=1, digest=""), model=network, tokenizer=tokenizer,
        text_tokenizer=text_tokenizer, facts=PolicyFacts(max_history=10),
    ).save(folder)  # fmt: skip
    return tokenizer


def test_an_answer_is_that_of_the_prompt_with_the_given_context(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "policy", BEHAVIOR)
    network = Policy.open(tmp_path / "policy").model
    unknown, buy, view = tokenizer.context.ids[0]

    def best(*tokens: int) -> np.ndarray:
        prompt = [tokenizer.bos]
        for item, token in zip(HISTORY, tokens, strict=True):
            first, last = tokenizer.item_tokens[1][item : item + 2]
            prompt += [*tokenizer.item_tokens[0][first:last].tolist(), token]
        scores = brute_force(network, tokenizer, np.array(prompt, np.int32))
        return np.sort(scores[ITEMS.leaf_of_item])[::-1]

    async def work(client: httpx.AsyncClient, service: Service) -> None:
        for given, tokens in (
            ({"behavior": ["buy", "view"]}, (buy, view)),
            ({"behavior": ["wish", None]}, (unknown, unknown)),
            ({}, (unknown, unknown)),
            (None, (unknown, unknown)),
        ):
            answer = await recommend(client, history=HISTORY, k=5, context=given)
            scores = [item["score"] for item in answer["items"]]
            assert scores == pytest.approx(best(*tokens)[:5], abs=1e-4)
            assert answer["source"] == "policy"  # another context is no hit of the cache
        again = await recommend(client, history=HISTORY, k=5, context={"behavior": ["buy", "view"]})
        assert again["source"] == "cache"

    served(tmp_path / "policy", work, cache_s=60.0, **BARE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"behavior": ["buy"]}, "a list of 2 values"),
        ({"behavior": "buy"}, "a list of 2 values"),
        ({"color": "red"}, "no context 'color'"),
        ({"behavior": [["buy"], "view"]}, ""),
        ({f"c{i}": 1 for i in range(65)}, ""),
    ],
)
def test_context_that_does_not_fit_is_unprocessable(
    tmp_path: Path, given: dict[str, object], said: str
) -> None:
    save(tmp_path / "policy", BEHAVIOR)

    async def work(client: httpx.AsyncClient, service: Service) -> None:
        body = {"history": HISTORY, "context": given}
        response = await client.post("/v1/recommend", json=body)
        assert response.status_code == 422
        assert said in response.json()["detail"]

    served(tmp_path / "policy", work, **BARE)


def test_a_policy_without_context_refuses_it_plainly(tmp_path: Path) -> None:
    save(tmp_path / "policy")

    async def work(client: httpx.AsyncClient, service: Service) -> None:
        body = {"history": HISTORY, "context": {"behavior": ["buy", "view"]}}
        response = await client.post("/v1/recommend", json=body)
        assert response.status_code == 422
        assert "leave it out" in response.json()["detail"]
        assert len(shown(await recommend(client, history=HISTORY, k=3))) == 3

    served(tmp_path / "policy", work, **BARE)


def test_answers_with_context_count_in_no_off_policy_estimate(tmp_path: Path) -> None:
    save(tmp_path / "policy", BEHAVIOR)

    async def work(client: httpx.AsyncClient, service: Service) -> None:
        await recommend(client, history=HISTORY, k=1)
        await recommend(client, history=HISTORY, k=1, context={"behavior": ["buy", "buy"]})

    served(tmp_path / "policy", work, exposure=tmp_path / "log", **BARE)
    rows = pl.read_parquet(tmp_path / "log" / "*.parquet")
    assert sorted(rows["restricted"].to_list()) == [False, True]


def test_a_variant_that_reads_other_context_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "policy", BEHAVIOR)
    save(tmp_path / "other", replace(BEHAVIOR, values=("view", "buy")))

    async def work(client: httpx.AsyncClient, service: Service) -> None: ...

    other = {"b": VariantConfig(policy=tmp_path / "other", share=0.5)}
    with pytest.raises(ConfigError, match="are not those of the main policy"):
        served(tmp_path / "policy", work, variants=other, **BARE)
