"""Searches below a prefix of the target: what they find, what they report, what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from orchard.catalog.view import full_view
from orchard.config import parse
from orchard.errors import CatalogError, ConfigError, EngineError
from orchard.policy import value_head
from orchard.settings import RolloutConfig, VedConfig
from orchard.testing import TinySetup, tiny_setup
from orchard.types import SearchTrees
from rollout.actor import RolloutWorker
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.item_filter import ItemFilter, make_prefix_mask
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.hints import check_hints, mark_hint, search_below_hint
from rollout.search.registry import SEARCHES
from rollout.search.sampling import beam_sample
from rollout.search.ved.search import ved
from rollout.search_trees import build_search_trees

WIDTH = 4
DRAWN = {"temperature": 1.0, "seed": 3}
FIND: dict[str, Callable[..., Candidates]] = {
    "beam": partial(beam, width=WIDTH),
    "beam_sample": partial(beam_sample, width=WIDTH, **DRAWN),
    "sample": partial(sample, count=WIDTH, **DRAWN),
}


def targets(world: TinySetup) -> list[tuple[int, ...]]:
    """Codes of each prompt's target."""
    return [world.leaf_path[leaf] for leaf in world.catalog.leaf_of_item[world.prompts.target]]


def below(world: TinySetup, prompt: int, codes: int) -> list[int]:
    prefix = targets(world)[prompt][:codes]
    return [leaf for leaf, path in enumerate(world.leaf_path) if path[:codes] == prefix]


def hinted(world: TinySetup, engine: TorchEngine, name: str, codes: int) -> Candidates:
    view = full_view(world.catalog.trie)
    return search_below_hint(engine, world.prompts, search_fn=FIND[name], view=view, codes=codes)


def depths(world: TinySetup) -> range:
    return range(1, min(map(len, targets(world))))


@pytest.mark.parametrize("name", FIND)
def test_candidates_are_below_the_hint_with_their_probability_given_it(
    world: TinySetup, engine: TorchEngine, name: str
) -> None:
    for codes in depths(world):
        found = hinted(world, engine, name, codes)
        for prompt in range(len(world.prompts)):
            leaves, logprob = below(world, prompt, codes), world.leaf_logprob[prompt]
            mass = np.logaddexp.reduce([logprob[leaf] for leaf in leaves])
            here = slice(found.start[prompt], found.start[prompt + 1])
            assert set(found.leaf[here].tolist()) <= set(leaves)
            expected = [logprob[leaf] - mass for leaf in found.leaf[here]]
            np.testing.assert_allclose(found.score[here], expected, atol=2e-5)
            assert not found.logprob[here, :codes].any()
            if name == "beam" and len(leaves) <= WIDTH:
                assert sorted(found.leaf[here].tolist()) == leaves


@pytest.mark.slow
def test_a_value_guided_search_stays_below_the_hint() -> None:
    guided = tiny_setup(level_size=(4, 4, 5), num_items=40)
    value_head.attach(guided.model, seed=0)
    engine = TorchEngine(guided.model, guided.tokenizer, guided.version)
    search_fn = partial(ved, settings=VedConfig(budget=20, width=4), count=WIDTH, seed=0)
    for codes in depths(guided):
        found = search_below_hint(
            engine,
            guided.prompts,
            search_fn=search_fn,
            view=full_view(guided.catalog.trie),
            codes=codes,
        )
        for prompt in range(len(guided.prompts)):
            leaves = below(guided, prompt, codes)
            here = found.leaf[found.start[prompt] : found.start[prompt + 1]].tolist()
            assert set(here) <= set(leaves)
            assert len(here) >= min(WIDTH, len(leaves))


def test_a_prefix_admits_the_nodes_on_its_way_and_those_below_it(world: TinySetup) -> None:
    trie, count = world.catalog.trie, len(world.prompts)
    draw = np.random.default_rng(0)
    for _ in range(5):
        prefix = draw.integers(trie.num_nodes, size=count)
        allowed = ItemFilter(
            view=full_view(trie),
            excluded=np.zeros(0, np.int64),
            excluded_start=np.zeros(count + 1, np.int64),
            prefix=prefix,
        )
        mask = make_prefix_mask(trie, allowed, count)
        rows = trie.path(torch.arange(trie.num_nodes)).tolist()
        paths = [[n for n in row if n >= 0] for row in rows]
        for prompt in range(count):
            want = paths[prefix[prompt]]
            node = torch.arange(trie.num_nodes)
            admitted = mask.allows(torch.full_like(node, prompt), node).tolist()
            for n, path in enumerate(paths):
                length = min(len(path), len(want))
                assert admitted[n] == (path[:length] == want[:length])
        picked = allowed.select(np.array([1, 0]))
        assert picked.prefix is not None
        assert picked.prefix.tolist() == prefix[[1, 0]].tolist()


@pytest.mark.parametrize(("count", "node"), [(1, 0), (None, 10**6), (None, -1)])
def test_a_prefix_of_another_batch_or_catalog_is_refused(count: int | None, node: int) -> None:
    world = tiny_setup()
    num_prompts = len(world.prompts)
    allowed = ItemFilter(
        view=full_view(world.catalog.trie),
        excluded=np.zeros(0, np.int64),
        excluded_start=np.zeros(num_prompts + 1, np.int64),
        prefix=np.full(count or num_prompts, node),
    )
    with pytest.raises(CatalogError, match="one prefix for each"):
        make_prefix_mask(world.catalog.trie, allowed, num_prompts)


def test_hinted_codes_are_forced_and_no_others(world: TinySetup, engine: TorchEngine) -> None:
    for codes in depths(world):
        found = hinted(world, engine, "beam", codes)
        trees = build_search_trees(world.prompts, found, world.tokenizer, world.version)
        marked = mark_hint(trees, codes)
        step = trees.step[np.repeat(np.arange(len(trees.step)), np.diff(trees.token_start))]
        assert marked.forced[step <= codes].all()
        np.testing.assert_array_equal(marked.forced[step > codes], trees.forced[step > codes])
        assert marked.hinted is not None
        assert marked.hinted.tolist() == [codes] * len(world.prompts)
        nothing = mark_hint(trees, 0)
        np.testing.assert_array_equal(nothing.forced, trees.forced)


@pytest.mark.slow
def test_a_worker_gives_hints_and_otherwise_searches_as_without_them(tmp_path: Path) -> None:
    world = tiny_setup()
    folder = world.save(tmp_path)

    def search(hints: int, hint: int) -> SearchTrees:
        config = RolloutConfig(engine="torch", group_size=WIDTH, hints=hints)
        worker = RolloutWorker(config, folder, world.tokenizer, seed=0)
        return worker.search(world.prompts, seed=1, step=0, hint=hint)

    plain, ready, given = search(0, 0), search(2, 0), search(2, 2)
    assert plain.hinted is None
    assert ready.hinted is not None
    assert not ready.hinted.any()
    for name in ("node_start", "parent", "state", "logprob", "forced", "candidate", "score"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(ready, name))
    assert given.hinted is not None
    assert given.hinted.tolist() == [2] * len(world.prompts)
    for prompt in range(len(world.prompts)):
        here = slice(given.candidate_start[prompt], given.candidate_start[prompt + 1])
        assert set(given.leaf[here].tolist()) <= set(below(world, prompt, 2))


def test_a_hint_of_a_whole_target_is_refused() -> None:
    world = tiny_setup()
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    view = full_view(world.catalog.trie)
    with pytest.raises(EngineError, match="leaves nothing to search"):
        search_below_hint(engine, world.prompts, search_fn=FIND["beam"], view=view,
                          codes=world.catalog.trie.depth)  # fmt: skip


@pytest.mark.parametrize("varying_depth", [False, True])
def test_hints_deeper_than_the_shortest_item_are_refused(varying_depth: bool) -> None:
    world = tiny_setup(varying_depth=varying_depth)
    shortest = min(map(len, world.leaf_path))
    check_hints(RolloutConfig(hints=shortest - 1), world.catalog.trie)
    with pytest.raises(ConfigError, match=f"to at most {shortest - 1}"):
        check_hints(RolloutConfig(hints=shortest), world.catalog.trie)


@pytest.mark.parametrize(
    ("rollout", "code"),
    [
        ({"hints": 1, "search": "dynamic"}, "hints_of_other_search"),
        ({"hints": 1, "search": "think"}, "hints_of_other_search"),
        ({"hints": 1, "add_target": True}, "hints_beside_targets"),
    ],
)
def test_hints_that_do_not_fit_are_refused(rollout: dict[str, object], code: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SEARCHES.check(parse({"name": "x", "data": {"path": "d"}, "rollout": rollout}))
    assert refused.value.code == f"config.{code}"


def test_a_weight_of_hints_needs_hints() -> None:
    tree = {"name": "x", "data": {"path": "d"}, "learner": {"hint_weight": 0.01}}
    with pytest.raises(ConfigError, match="has no hints to learn"):
        parse(tree)
    parse(tree | {"rollout": {"hints": 2}})
