"""Texts that continue earlier ones: the same draws, and no token is computed twice."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from orchard import ragged
from orchard.testing import TinySetup, tiny_thinking_setup
from orchard.types import PolicyVersion
from rollout.engine.generate import generate
from rollout.engine.protocol import Completions, GenerationParams
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam

PARAMS = GenerationParams(stop=(3, 4), limit=5, temperature=1.0)


@pytest.fixture(scope="module")
def world() -> TinySetup:
    return tiny_thinking_setup(lengths=(2, 9, 4))


@pytest.fixture
def engine(world: TinySetup) -> TorchEngine:
    return TorchEngine(world.model, world.tokenizer, PolicyVersion(step=0, digest="0" * 64))


@pytest.fixture
def forwarded(world: TinySetup) -> Iterator[list[int]]:
    """Tokens of each forward pass, padding included."""
    counts: list[int] = []

    def count(_: object, args: object, inputs: dict[str, torch.Tensor]) -> None:
        counts.append(inputs["input_ids"].numel())

    hook = world.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    hook.remove()


def contexts_of(world: TinySetup, count: int) -> list[list[int]]:
    prompts = np.split(world.prompts.token, world.prompts.token_start[1:-1])
    return [prompt.tolist() for prompt in prompts for _ in range(count)]


def texts(made: Completions) -> list[list[int]]:
    return [made.token[a:b].tolist() for a, b in zip(made.start[:-1], made.start[1:], strict=True)]


def continued(contexts: Sequence[Sequence[int]], made: Completions) -> list[list[int]]:
    return [[*context, *text, 5] for context, text in zip(contexts, texts(made), strict=True)]


def test_equal_contexts_are_forwarded_once(
    world: TinySetup, engine: TorchEngine, forwarded: list[int]
) -> None:
    engine.generate(contexts_of(world, 4), np.arange(12), PARAMS)
    assert forwarded[0] == np.diff(world.prompts.token_start).max() * 3
    assert set(forwarded[1:]) <= {12}


def test_blocks_and_codes_after_a_text_are_those_of_whole_contexts(
    world: TinySetup, engine: TorchEngine, forwarded: list[int]
) -> None:
    contexts = contexts_of(world, 4)
    for block in range(3):
        key = np.arange(12) + 100 * block
        made = engine.generate(contexts, key, PARAMS)
        alone = generate(world.model, contexts, key, PARAMS)
        np.testing.assert_array_equal(made.token, alone.token)
        np.testing.assert_array_equal(made.start, alone.start)
        np.testing.assert_allclose(made.logprob, alone.logprob, atol=1e-5)
        contexts = continued(contexts, made)
    # Some of the texts have ended early, which leaves unused slots between their tokens.
    assert len({len(text) for text in texts(made)}) > 1
    row = np.repeat(np.arange(3), 4)
    prompts = replace(
        world.prompts.select(row),
        token=np.concatenate([np.array(context, np.int32) for context in contexts]),
        token_start=ragged.starts(np.array([len(context) for context in contexts])),
    )
    forwarded.clear()
    found = beam(engine, prompts, width=4)
    assert forwarded[0] <= 12 * 2, "the texts' tokens were computed again"
    fresh = TorchEngine(world.model, world.tokenizer, engine.version)
    expected = beam(fresh, prompts, width=4)
    np.testing.assert_array_equal(found.leaf, expected.leaf)
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)


def test_contexts_of_which_one_is_new_start_anew(
    world: TinySetup, engine: TorchEngine, forwarded: list[int]
) -> None:
    contexts = contexts_of(world, 1)
    later = continued(contexts, engine.generate(contexts, np.arange(3), PARAMS))
    later[1] = [7, *later[1]]
    forwarded.clear()
    made = engine.generate(later, np.arange(3), PARAMS)
    assert forwarded[0] == 3 * max(map(len, later))
    np.testing.assert_array_equal(
        made.token, generate(world.model, later, np.arange(3), PARAMS).token
    )
