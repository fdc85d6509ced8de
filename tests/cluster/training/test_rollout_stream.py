import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.training.loop import step_metrics
from cluster.training.rollout_stream import (
    RolloutStream,
    draw_groups,
    groups_of_step,
    search_with_hints,
)
from learner.advantage.estimators import teaching_groups
from learner.batch.pack import make_batch
from orchard.config import parse
from orchard.data.prompts import rows_of_step
from orchard.settings import Config, RolloutConfig
from orchard.testing import TinySetup, tiny_prompts, tiny_setup
from orchard.types import PolicyVersion, ScoredTrees, Update
from rewards.score import score_trees
from rollout.actor import RolloutWorker
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees


def version(step: int) -> PolicyVersion:
    return PolicyVersion(step=step, digest="")


class World:
    """Fake rollout with the policy published at its start, and varying running times."""

    def __init__(self, delays: list[int]) -> None:
        self.delays, self.published, self.begun = delays, version(0), list[int]()

    async def rollout(self, step: int) -> Any:
        self.begun.append(step)
        policy = self.published
        for _ in range(self.delays[step % len(self.delays)]):
            await asyncio.sleep(0)
        return SimpleNamespace(step=step, policy=policy)


async def run(world: World, *, steps: int, max_lag: int, first: int = 0) -> list[tuple[int, int]]:
    """Return (step, lag) of every batch, with a publication after each."""
    world.published = version(first)
    stream = RolloutStream(world.rollout, first=first, last=steps, max_lag=max_lag)
    stream.start_allowed_by(world.published)
    seen: list[tuple[int, int]] = []
    async for trees in stream:
        in_flight = len(world.begun) - len(seen)
        assert in_flight <= max_lag + 1
        seen.append((trees.step, world.published.step - trees.policy.step))
        world.published = version(world.published.step + 1)
        stream.start_allowed_by(world.published)
    await stream.close()
    return seen


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_batches_come_in_order_and_never_staler_than_the_bound(max_lag: int) -> None:
    seen = asyncio.run(run(World([5, 0, 9, 1]), steps=12, max_lag=max_lag))
    assert [step for step, _ in seen] == list(range(12))
    assert max(lag for _, lag in seen) == max_lag


def test_without_lag_every_batch_is_of_the_newest_policy() -> None:
    seen = asyncio.run(run(World([3]), steps=5, max_lag=0))
    assert [lag for _, lag in seen] == [0] * 5


def test_a_resumed_stream_begins_where_it_is_told() -> None:
    world = World([2])
    seen = asyncio.run(run(world, steps=9, max_lag=1, first=6))
    assert [step for step, _ in seen] == world.begun == [6, 7, 8]


def test_a_failed_rollout_is_raised_and_the_rest_is_cancelled() -> None:
    async def failing(step: int) -> Any:
        if step == 0:
            raise ValueError("broken")
        await asyncio.Event().wait()

    async def scenario() -> None:
        stream = RolloutStream(failing, first=0, last=3, max_lag=2)
        stream.start_allowed_by(version(0))
        with pytest.raises(ValueError, match="broken"):
            await anext(aiter(stream))
        await asyncio.wait_for(stream.close(), timeout=5)

    asyncio.run(scenario())


def test_a_stopped_stream_ends_at_once_whatever_is_running() -> None:
    async def scenario() -> list[int]:
        world, stop, seen = World([1, 10**9]), asyncio.Event(), list[int]()
        stream = RolloutStream(world.rollout, first=0, last=5, max_lag=0, stop=stop)
        stream.start_allowed_by(version(0))
        async for trees in stream:
            seen.append(trees.step)
            stream.start_allowed_by(version(1))
            asyncio.get_running_loop().call_later(0.01, stop.set)
        await stream.close()
        return seen

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == [0]


class Shop:
    """A worker and rewards of a tiny world, whose rows are prompts of growing histories."""

    def __init__(self, folder: Path, **rollout: object) -> None:
        self.setup: TinySetup = tiny_setup(level_size=(6, 4, 5), num_items=100)
        settings = {"engine": "torch", "group_size": 4, "batch_size": 3} | rollout
        self.settings = settings
        self.worker = RolloutWorker(
            RolloutConfig.model_validate(settings), self.setup.save(folder), self.setup.tokenizer,
            seed=0,
        )  # fmt: skip
        self.prompts = tiny_prompts(self.setup.catalog, [1 + row % 4 for row in range(60)])
        self.searches = list[tuple[list[int], int, int]]()

    def config(self, **learner: object) -> Config:
        return parse(
            {
                "name": "x", "data": {"path": "d"}, "rollout": self.settings, "seed": 5,
                "learner": {"prompts_per_step": 8} | learner,
            }
        )  # fmt: skip

    async def search(self, rows: np.ndarray, seed: int, hint: int) -> ScoredTrees:
        self.searches.append((rows.tolist(), seed, hint))
        prompts = replace(self.prompts.select(rows), id=rows.astype(np.int64))
        trees = self.worker.search(prompts, seed, 0, hint=hint)
        return score_trees(trees, self.setup.catalog, {"rule": 1.0})

    def step(self, step: int, **learner: object) -> ScoredTrees:
        return asyncio.run(groups_of_step(step, self.config(**learner), self.search, num_rows=60))


def spreads(scored: ScoredTrees) -> list[bool]:
    """Whether the rewards of each group differ, group by group."""
    bounds = scored.trees.candidate_start
    groups = [scored.reward[a:b] for a, b in pairwise(bounds)]
    return [len(set(group.tolist())) > 1 for group in groups]


@pytest.mark.slow
def test_without_further_draws_and_hints_a_step_is_searched_once(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    scored = shop.step(2)
    rows = rows_of_step(2, num_rows=60, per_step=8, seed=5).tolist()
    seed = 5 * 1_000_003 + 2
    assert shop.searches == [(rows[:3], seed, 0), (rows[3:6], seed, 0), (rows[6:], seed, 0)]
    assert scored.trees.prompts.id.tolist() == rows
    assert not scored.trees.cost.counts
    assert scored.trees.hinted is None


@pytest.mark.slow
def test_groups_are_drawn_until_enough_teach(tmp_path: Path) -> None:
    shop = Shop(tmp_path, batch_size=5)
    for step in range(3):
        shop.searches.clear()
        scored = shop.step(step, max_draws=5)
        walk = rows_of_step(step, num_rows=60, per_step=40, seed=5)
        # By a loop: every draw on its own, until eight groups have a spread.
        drawn, teaches, cost = list[int](), list[bool](), 0
        for draw in range(5):
            part = walk[draw * 8 : (draw + 1) * 8]
            alone = asyncio.run(shop.search(part, 5 * 1_000_003 + step, 0))
            drawn, teaches = drawn + part.tolist(), teaches + spreads(alone)
            cost += alone.trees.cost.forward_tokens
            if sum(teaches) >= 8:
                break
        first = [i for i, one in enumerate(teaches) if one][:8]
        rest = [i for i, one in enumerate(teaches) if not one][: 8 - len(first)]
        assert scored.trees.prompts.id.tolist() == [drawn[i] for i in sorted(first + rest)]
        assert sum(spreads(scored)) == len(first)
        assert scored.trees.cost.counts == {"drawn": len(drawn), "teaching": sum(teaches)}
        assert scored.trees.cost.forward_tokens == cost
        assert len(scored.trees) == 8
    again = shop.step(step, max_draws=5)  # as a resumed run would
    np.testing.assert_array_equal(again.trees.leaf, scored.trees.leaf)
    np.testing.assert_array_equal(again.reward, scored.reward)


@pytest.mark.slow
def test_draws_stop_at_their_bound_and_where_enough_groups_teach() -> None:
    def blank(rows: Sequence[int]) -> ScoredTrees:
        trees = tiny_trees(rows)
        return ScoredTrees(trees=trees, reward=np.zeros(len(trees.leaf), np.float32), parts={})

    async def drawn(teaching: Sequence[Sequence[bool]], most: int) -> tuple[list[int], int]:
        asked = list[int]()

        async def draw(number: int) -> ScoredTrees:
            asked.append(number)
            return blank(range(10 * number, 10 * number + 2))

        scored = await draw_groups(
            draw, wanted=2, most=most, teaches=lambda part: np.array(
                teaching[int(part.trees.prompts.id[0]) // 10]
            ),
        )  # fmt: skip
        return scored.trees.prompts.id.tolist(), len(asked)

    nothing, one, both = (False, False), (False, True), (True, True)
    assert asyncio.run(drawn([nothing, nothing], 1)) == ([0, 1], 1)
    assert asyncio.run(drawn([nothing] * 3, 3)) == ([0, 1], 3)
    assert asyncio.run(drawn([both, both], 3)) == ([0, 1], 1)
    assert asyncio.run(drawn([one, nothing, one], 3)) == ([1, 21], 3)
    assert asyncio.run(drawn([nothing, one], 2)) == ([0, 11], 2)
    assert asyncio.run(drawn([one, both], 2)) == ([1, 10], 2)


def tiny_trees(rows: Sequence[int]) -> Any:
    """Trees of these prompts, with two candidates each."""
    setup = tiny_setup()
    worker_prompts = tiny_prompts(setup.catalog, [1] * len(rows))
    prompts = replace(worker_prompts, id=np.array(rows, np.int64))
    engine = TorchEngine(setup.model, setup.tokenizer, setup.version)
    found = beam(engine, prompts, width=2)
    return build_search_trees(prompts, found, setup.tokenizer, setup.version)


@pytest.mark.slow
def test_a_group_that_teaches_nothing_gets_the_shortest_hint_that_helps(tmp_path: Path) -> None:
    shop = Shop(tmp_path, hints=2)
    scored = shop.step(1)
    rows = rows_of_step(1, num_rows=60, per_step=8, seed=5)
    seed, cost, searches, expected = 5 * 1_000_003 + 1, 0, 0, list[tuple[int, list[int]]]()
    for row in rows:
        kept, codes = asyncio.run(shop.search(np.array([row]), seed, 0)), 0
        first = kept
        cost += kept.trees.cost.forward_tokens
        while not spreads(kept)[0] and codes < 2:
            codes, searches = codes + 1, searches + 1
            kept = asyncio.run(shop.search(np.array([row]), seed, codes))
            cost += kept.trees.cost.forward_tokens
        if not spreads(kept)[0]:
            kept, codes = first, 0
        expected.append((codes, kept.trees.leaf.tolist()))
    assert scored.trees.hinted is not None
    bounds = scored.trees.candidate_start
    found = [
        (int(codes), scored.trees.leaf[a:b].tolist())
        for codes, a, b in zip(scored.trees.hinted, bounds[:-1], bounds[1:], strict=True)
    ]
    assert found == expected
    assert scored.trees.prompts.id.tolist() == rows.tolist()
    hinted = [codes > 0 for codes, _ in expected]
    assert any(hinted)
    assert scored.trees.cost.counts == {"hint_searches": searches, "hinted": sum(hinted)}
    assert scored.trees.cost.forward_tokens == cost


@pytest.mark.slow
def test_hinted_codes_have_no_choice_and_their_prompts_are_learned_from(tmp_path: Path) -> None:
    shop = Shop(tmp_path, hints=2)
    config = shop.config(hint_weight=0.01)
    scored = shop.step(1)
    batch = make_batch(scored, shop.setup.tokenizer, config.learner)
    trie = shop.setup.catalog.trie
    hinted, depth = scored.trees.hinted, trie.depth_of
    assert hinted is not None
    level = depth(torch.from_numpy(batch.chosen)).numpy()
    assert (level > hinted[batch.row]).all()
    assert teaching_groups(scored, config.learner)[hinted > 0].all()
    assert batch.codes is not None
    level = depth(torch.from_numpy(batch.codes.chosen)).numpy()
    assert (level <= hinted[batch.codes.row]).all()
    assert set(batch.codes.row.tolist()) <= set(np.flatnonzero(hinted).tolist())
    assert len(batch.codes.row)


@pytest.mark.slow
def test_the_log_counts_every_search(tmp_path: Path) -> None:
    shop = Shop(tmp_path, hints=1)
    scored = shop.step(0, max_draws=2)
    update = Update(policy=version(1), metrics={})
    found, counts = step_metrics(scored, update, 0), scored.trees.cost.counts
    assert found["rollout/prompts"] == 8
    assert found["rollout/drawn"] == counts["drawn"] / 8
    assert found["rollout/teaching"] == counts["teaching"] / 8
    assert found["rollout/hinted"] == counts["hinted"] / 8
    searched = counts["drawn"] + counts["hint_searches"]
    assert found["rollout/prompts_per_s"] == searched / scored.trees.cost.seconds


def test_hints_stop_where_all_groups_teach() -> None:
    asked = list[tuple[list[int], int]]()

    async def search(rows: np.ndarray, codes: int) -> ScoredTrees:
        asked.append((rows.tolist(), codes))
        trees = replace(tiny_trees(rows.tolist()), hinted=np.full(len(rows), codes))
        return ScoredTrees(trees=trees, reward=np.zeros(len(trees.leaf), np.float32), parts={})

    def teaches(part: ScoredTrees) -> np.ndarray:
        assert part.trees.hinted is not None
        return part.trees.hinted >= part.trees.prompts.id  # row n needs n codes

    scored = asyncio.run(search_with_hints(search, num_prompts=3, deepest=5, teaches=teaches))
    assert asked == [([0, 1, 2], 0), ([1, 2], 1), ([2], 2)]
    assert scored.trees.hinted is not None
    assert scored.trees.hinted.tolist() == [0, 1, 2]
    assert scored.trees.prompts.id.tolist() == [0, 1, 2]
