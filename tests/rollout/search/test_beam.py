"""Beam search against enumeration, and against a slow beam search over enumerated numbers."""

from collections.abc import Callable

import numpy as np
import pytest

from orchard.errors import ConfigError, EngineError
from orchard.settings.widths import of_levels
from orchard.testing import TinySetup, tiny_prompts, tiny_setup
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from tests.fixtures.guides import random_guide


def found(candidates: Candidates, prompt: int) -> dict[int, float]:
    rows = slice(candidates.start[prompt], candidates.start[prompt + 1])
    return dict(zip(candidates.leaf[rows].tolist(), candidates.score[rows].tolist(), strict=True))


def slow_beam(
    leaf_path: list[tuple[int, ...]], leaf_logprob: np.ndarray, width: int | tuple[int, ...]
) -> dict[int, float]:
    """Keep the best prefixes depth by depth; a prefix is as likely as the leaves below it."""
    beams: list[tuple[int, ...]] = [()]
    levels = max(len(path) for path in leaf_path)
    for depth, most in enumerate(of_levels(width, levels), start=1):
        score = {
            path[:depth]: np.logaddexp.reduce(
                [p for other, p in zip(leaf_path, leaf_logprob, strict=True)
                 if other[:depth] == path[:depth]]
            )
            for path in leaf_path
            if any(path[: len(b)] == b for b in beams)
        }  # fmt: skip
        beams = sorted(score, key=lambda prefix: -score[prefix])[:most]
    return {leaf: leaf_logprob[leaf] for leaf, path in enumerate(leaf_path) if path in beams}


def test_a_beam_as_wide_as_the_catalog_enumerates_it(world: TinySetup, engine: TorchEngine) -> None:
    every = beam(engine, world.prompts, width=100)
    for prompt, expected in enumerate(world.leaf_logprob):
        scores = found(every, prompt)
        assert sorted(scores) == list(range(len(expected)))
        assert np.allclose([scores[leaf] for leaf in range(len(expected))], expected, atol=1e-5)
        assert np.isclose(np.exp(list(scores.values())).sum(), 1, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 5, 11])
def test_a_narrow_beam_equals_a_slow_one(world: TinySetup, engine: TorchEngine, width: int) -> None:
    candidates = beam(engine, world.prompts, width=width)
    for prompt, leaf_logprob in enumerate(world.leaf_logprob):
        expected = slow_beam(world.leaf_path, leaf_logprob, width)
        scores = found(candidates, prompt)
        assert list(scores) == sorted(expected, key=lambda leaf: -expected[leaf])
        assert np.allclose(list(scores.values()), sorted(expected.values())[::-1], atol=1e-5)


def test_candidates_are_best_first_and_never_twice(world: TinySetup, engine: TorchEngine) -> None:
    for width in (4, 100):
        candidates = beam(engine, world.prompts, width=width)
        count = min(width, world.catalog.trie.num_leaves)
        assert np.diff(candidates.start).tolist() == [count] * len(world.prompts)
        for prompt in range(len(world.prompts)):
            scores = found(candidates, prompt)
            assert len(scores) == count
            assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_scores_are_the_sums_of_the_codes_and_forced_codes_are_free(
    world: TinySetup, engine: TorchEngine
) -> None:
    candidates, trie = beam(engine, world.prompts, width=7), world.catalog.trie
    assert np.allclose(candidates.logprob.sum(1), candidates.score, atol=1e-6)
    for leaf, node, logprob in zip(
        candidates.leaf, candidates.node, candidates.logprob, strict=True
    ):
        assert tuple(node[node >= 0]) == world.leaf_path[leaf]
        above = np.concatenate([[0], node[:-1]])
        width = trie.num_children(trie.leaf_node.new_tensor(above)).numpy()
        assert (logprob[(width == 1) | (node < 0)] == 0).all()
        assert (logprob[(width > 1) & (node >= 0)] < 0).all()


def test_a_prompt_gives_the_same_alone_as_in_a_batch(world: TinySetup, engine: TorchEngine) -> None:
    together = beam(engine, world.prompts, width=6)
    for prompt in range(len(world.prompts)):
        alone = beam(engine, world.prompts.select(np.array([prompt])), width=6)
        ours = together.select(np.array([prompt]))
        assert alone.leaf.tolist() == ours.leaf.tolist()
        assert np.allclose(alone.logprob, ours.logprob, atol=1e-5)


def test_equal_scores_are_ordered_by_trie_node(
    torch_engine: Callable[[TinySetup], TorchEngine],
) -> None:
    world = tiny_setup()
    for parameter in world.model.parameters():
        parameter.data.zero_()  # every code is as likely as its siblings
    every = beam(torch_engine(world), world.prompts, width=100)
    order = np.lexsort((every.leaf, -every.score, np.repeat(np.arange(4), np.diff(every.start))))
    assert order.tolist() == list(range(len(order)))
    assert len(set(every.score.tolist())) < world.catalog.trie.num_leaves / 2
    few = beam(torch_engine(world), world.prompts, width=2)
    assert few.leaf[:2].tolist() == few.leaf[2:4].tolist()


def test_the_last_choice_and_what_is_forced_after_it_are_not_forwarded(
    torch_engine: Callable[[TinySetup], TorchEngine],
) -> None:
    world = tiny_setup()
    trie, prompts = world.catalog.trie, world.prompts
    cost = beam(torch_engine(world), prompts, width=100).cost
    nodes = trie.leaf_node.new_tensor(range(1, trie.num_nodes))
    forwarded = nodes[trie.num_children(nodes) > 1]  # chains above them go with them
    chained = {int(n) for row in trie.path(forwarded).tolist() for n in row if n >= 0}
    assert cost.forward_tokens == len(prompts) * len(chained)
    assert cost.prefill_tokens == len(prompts.token)
    assert cost.passes == trie.depth


def test_a_prompt_too_long_for_the_policy_is_refused(world: TinySetup, engine: TorchEngine) -> None:
    depth, limit = world.catalog.trie.depth, world.model.config.max_position_embeddings
    codes = int((world.catalog.codes[0] >= 0).sum())
    long: Prompts = tiny_prompts(world.catalog, [limit // codes + limit])
    with pytest.raises(EngineError, match=f"and {depth} codes exceed the policy's {limit}"):
        beam(engine, long, width=2)


def test_a_policy_that_has_diverged_is_named(
    torch_engine: Callable[[TinySetup], TorchEngine],
) -> None:
    world = tiny_setup()
    world.model.get_input_embeddings().weight.data[0] = float("nan")
    world.model.base_model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(EngineError, match="are not finite; its training has diverged"):
        beam(torch_engine(world), world.prompts, width=2)


def test_selected_candidates_are_those_of_the_prompts_asked_for(
    world: TinySetup, engine: TorchEngine
) -> None:
    every = beam(engine, world.prompts, width=5)
    rows = np.array([2, 0])
    chosen = every.select(rows)
    for place, row in enumerate(rows):
        assert found(chosen, place) == found(every, int(row))
    again = Candidates.concatenate([every.select(np.array([r])) for r in range(4)])
    assert again.leaf.tolist() == every.leaf.tolist()
    assert again.start.tolist() == every.start.tolist()
    assert np.array_equal(again.node, every.node)


@pytest.mark.parametrize("guided", [False, True])
def test_a_width_for_each_level_is_that_of_a_slow_beam(
    world: TinySetup, engine: TorchEngine, guided: bool
) -> None:
    guide = random_guide(world.catalog, seed=4) if guided else None
    depth = world.catalog.trie.depth
    for width in (3, 7):
        number = beam(engine, world.prompts, width=width, guide=guide)
        alike = beam(engine, world.prompts, width=(width,) * depth, guide=guide)
        for name in ("start", "node", "logprob", "score", "leaf"):
            assert np.array_equal(getattr(number, name), getattr(alike, name))
        assert alike.cost.forward_tokens == number.cost.forward_tokens
    widths = tuple(range(2, 2 + depth))
    found_by_level = beam(engine, world.prompts, width=widths, guide=guide)
    assert (np.diff(found_by_level.start) <= widths[-1]).all()
    narrow = beam(engine, world.prompts, width=widths[0], guide=guide)
    assert found_by_level.cost.forward_tokens >= narrow.cost.forward_tokens
    if guided:
        return
    for prompt, leaf_logprob in enumerate(world.leaf_logprob):
        expected = slow_beam(world.leaf_path, leaf_logprob, widths)
        scores = found(found_by_level, prompt)
        assert list(scores) == sorted(expected, key=lambda leaf: -expected[leaf])


def test_a_list_of_widths_for_other_levels_is_refused(
    world: TinySetup, engine: TorchEngine
) -> None:
    with pytest.raises(ConfigError, match="give one number for each level"):
        beam(engine, world.prompts, width=(4,) * (world.catalog.trie.depth + 1))
