"""Beam search and training over titles: token tries of varying depth with shared prefixes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from orchard.testing import TinySetup, tiny_title_setup
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search_trees import build_search_trees

TITLES = ["ab", "abc", "abd", "b", "ba ba", "ba bc", "ab", "cab", "c", "cc"]


@pytest.fixture(scope="module")
def world() -> TinySetup:
    return tiny_title_setup(TITLES)


def test_a_beam_enumerates_the_titles_with_their_exact_probabilities(
    world: TinySetup, torch_engine: Callable[[TinySetup], TorchEngine]
) -> None:
    found = beam(torch_engine(world), world.prompts, width=100)
    for prompt, expected in enumerate(world.leaf_logprob):
        rows = slice(found.start[prompt], found.start[prompt + 1])
        assert sorted(found.leaf[rows].tolist()) == list(range(len(set(TITLES))))
        assert np.allclose(found.score[rows], expected[found.leaf[rows]], atol=1e-5)
        assert np.isclose(np.exp(expected).sum(), 1)


def test_a_narrow_beam_over_titles_finds_titles_only(
    world: TinySetup, torch_engine: Callable[[TinySetup], TorchEngine]
) -> None:
    found = beam(torch_engine(world), world.prompts, width=3)
    for prompt, expected in enumerate(world.leaf_logprob):
        rows = slice(found.start[prompt], found.start[prompt + 1])
        assert np.allclose(found.score[rows], expected[found.leaf[rows]], atol=1e-5)


def test_trees_of_titles_hold_the_tokens_of_the_titles(
    world: TinySetup, torch_engine: Callable[[TinySetup], TorchEngine]
) -> None:
    engine = torch_engine(world)
    found = sample(engine, world.prompts, count=8, temperature=1.0, seed=3)
    trees = build_search_trees(world.prompts, found, world.tokenizer, world.version)
    inner = torch.from_numpy(trees.state[trees.step > 0])
    expected = world.tokenizer.token_of(inner)
    assert trees.token.tolist() == expected.tolist()
    assert set(trees.token.tolist()) <= set(world.catalog.code_token)
