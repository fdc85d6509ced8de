"""Beams that the policy's own value head guides, alone or with a guide."""

from functools import partial

import numpy as np
import pytest
import torch

from orchard import ragged
from orchard.errors import ConfigError, EngineError
from orchard.policy import value_head
from orchard.settings import Config, RolloutConfig
from orchard.testing import TinySetup, tiny_setup
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.registry import SEARCHES, SearchContext, make_search
from tests.fixtures.guides import random_guide
from tests.fixtures.values import with_head


@pytest.fixture(scope="module")
def sure() -> tuple[TinySetup, TorchEngine]:
    world = tiny_setup(varying_depth=True, num_items=60, lengths=(0, 3, 1, 7), seed=1)
    return world, with_head(world, scale=0.5)


def values_of(world: TinySetup, engine: TorchEngine, found: Candidates) -> np.ndarray:
    """Return the value of the deepest choice on the path of each candidate; 0 below the root."""
    trie, prompt = world.catalog.trie, ragged.row_of(found.start)
    result = np.zeros(len(found.leaf), np.float32)
    paths = list[np.ndarray]()
    chosen = list[int]()
    for index, path in enumerate(found.node):
        inner = path[path >= 0]
        choices = np.flatnonzero((trie.num_children(torch.from_numpy(inner)) > 1).numpy())
        if len(choices):
            chosen.append(index)
            paths.append(inner[: choices[-1] + 1])
    # Each path after a copy of its prompt, which no other path shares.
    alone = engine.prefill(world.prompts.select(prompt[chosen]))
    start = torch.from_numpy(ragged.starts(np.array([len(path) for path in paths])))
    node = torch.from_numpy(np.concatenate(paths))
    at = engine.extend(alone.state, world.tokenizer.token_of(node), start, node[start[1:] - 1])
    assert at.value is not None
    result[chosen] = at.value.numpy()
    return result


@pytest.mark.parametrize("guided", [False, True])
def test_keys_hold_the_value_of_the_last_choice(
    sure: tuple[TinySetup, TorchEngine], guided: bool
) -> None:
    world, engine = sure
    guide = random_guide(world.catalog, seed=1) if guided else None
    found = beam(engine, world.prompts, width=100, guide=guide, head=True)
    plain = beam(engine, world.prompts, width=100)
    prompt, value = ragged.row_of(found.start), values_of(world, engine, found)
    assert value.std() > 0.05
    key = found.score + value
    if guide is not None:
        key += guide.reward(world.prompts, prompt, found.leaf)
    for rows in np.split(key, found.start[1:-1]):
        assert (np.diff(rows) <= 1e-4).all()
    assert found.leaf.tolist() != plain.leaf.tolist()
    # Scores stay those of the policy.
    order, other = np.lexsort((found.leaf, prompt)), np.lexsort((plain.leaf, prompt))
    assert np.allclose(found.score[order], plain.score[other], atol=1e-5)
    assert found.proved is None


def test_a_head_steers_what_a_narrow_beam_finds(sure: tuple[TinySetup, TorchEngine]) -> None:
    world, engine = sure
    found, plain = (beam(engine, world.prompts, width=4, head=head) for head in (True, False))
    assert found.leaf.tolist() != plain.leaf.tolist()
    alone = beam(engine, world.prompts.select(np.array([2])), width=4, head=True)
    assert alone.leaf.tolist() == found.select(np.array([2])).leaf.tolist()
    first = beam(engine, world.prompts, width=4, head=True, count=2)
    assert [part[:2].tolist() for part in np.split(found.leaf, found.start[1:-1])] == [
        part.tolist() for part in np.split(first.leaf, first.start[1:-1])
    ]


def test_an_untaught_head_changes_no_bit() -> None:
    world = tiny_setup(seed=3)
    value_head.attach(world.model, seed=0)
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    plain, found = (beam(engine, world.prompts, width=5, head=head) for head in (False, True))
    for name in ("start", "node", "logprob", "score", "leaf"):
        assert np.array_equal(getattr(plain, name), getattr(found, name))


def test_a_policy_without_a_head_is_refused() -> None:
    world = tiny_setup(seed=3)
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    with pytest.raises(EngineError, match="needs a policy with a value head"):
        beam(engine, world.prompts, width=3, head=True)
    (rule,) = SEARCHES.facts("beam").rules
    for guide in ("head", "expert+head"):
        settings = Config.model_validate(
            {"name": "a", "data": {"path": "data"}, "rollout": {"guide": guide}}
        )
        with pytest.raises(ConfigError, match=r"set model\.value_head = true"):
            rule(settings)


@pytest.mark.parametrize("guide", ["head", "expert+head"])
def test_the_setting_chooses_the_values(sure: tuple[TinySetup, TorchEngine], guide: str) -> None:
    world, engine = sure
    experts = random_guide(world.catalog, seed=1)
    config = RolloutConfig(engine="torch", group_size=6, guide=guide)  # pyright: ignore[reportArgumentType]
    ctx = SearchContext(
        config=config, engine=engine, tokenizer=world.tokenizer, seed=0, guide=experts
    )
    trees = make_search("beam", ctx)(world.prompts)
    search = partial(beam, width=6, head=True, guide=experts if "expert" in guide else None)
    assert trees.leaf.tolist() == search(engine, world.prompts).leaf.tolist()
    facts = SEARCHES.facts("beam")
    assert facts.uses_guide is not None
    assert facts.uses_guide(config) == ("expert" in guide)
