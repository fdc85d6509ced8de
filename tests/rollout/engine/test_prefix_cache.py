"""Histories that grow: the same answers, and only new items are forwarded."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from orchard import ragged
from orchard.policy.weights import snapshot
from orchard.testing import TinySetup, tiny_setup
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam

LIMIT = 1 << 20
"""Bytes, more than all prompts here need."""


@pytest.fixture(scope="module")
def setup() -> TinySetup:
    return tiny_setup(level_size=(5, 4, 6), num_items=40)


@pytest.fixture
def keeping(setup: TinySetup) -> TorchEngine:
    return TorchEngine(setup.model, setup.tokenizer, setup.version, prefix_bytes=LIMIT)


@pytest.fixture
def forwarded(setup: TinySetup) -> Iterator[list[int]]:
    """Tokens of each forward pass, padding included."""
    counts: list[int] = []

    def count(_: object, args: object, inputs: dict[str, torch.Tensor]) -> None:
        counts.append(inputs["input_ids"].numel())

    hook = setup.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    hook.remove()


def prompts_of(world: TinySetup, *histories: list[int]) -> Prompts:
    item = np.array([i for history in histories for i in history], np.int64)
    start = ragged.starts(np.array([len(history) for history in histories]))
    token, token_start = world.tokenizer.encode_history(item, start)
    return Prompts(
        id=np.arange(len(histories)), target=np.zeros(len(histories), np.int64), history=item,
        history_start=start, token=token, token_start=token_start,
    )  # fmt: skip


def same(ours: Candidates, theirs: Candidates) -> None:
    assert ours.leaf.tolist() == theirs.leaf.tolist()
    assert np.allclose(ours.score, theirs.score, atol=1e-5)
    assert np.allclose(ours.logprob, theirs.logprob, atol=1e-5)


def test_a_history_that_grows_costs_its_new_items(
    setup: TinySetup, keeping: TorchEngine, forwarded: list[int]
) -> None:
    plain = TorchEngine(setup.model, setup.tokenizer, setup.version)
    history = [3, 17, 5, 8, 21, 30]
    for size in range(1, len(history) + 1):
        prompts = prompts_of(setup, history[:size])
        expected = beam(plain, prompts, width=6)
        forwarded.clear()
        same(beam(keeping, prompts, width=6), expected)
        assert forwarded[0] == (len(prompts.token) if size == 1 else 3)
    assert keeping.prefixes is not None
    assert (keeping.prefixes.hits, len(keeping.prefixes)) == (5, 1)
    # One bos and three codes an item.
    assert keeping.prefixes.tokens == sum(1 + 3 * size for size in range(1, 6))


def test_the_same_history_again_costs_no_prefill(
    setup: TinySetup, keeping: TorchEngine, forwarded: list[int]
) -> None:
    prompts = prompts_of(setup, [3, 17], [4])
    first = beam(keeping, prompts, width=6)
    passes = len(forwarded)
    same(beam(keeping, prompts, width=6), first)
    assert len(forwarded) == 2 * passes - 1


def test_a_batch_may_hold_kept_grown_and_new_histories(
    setup: TinySetup, keeping: TorchEngine
) -> None:
    plain = TorchEngine(setup.model, setup.tokenizer, setup.version)
    beam(keeping, prompts_of(setup, [3, 17, 5], [4], [9, 9]), width=2)
    mixed = prompts_of(setup, [3, 17, 5], [4, 11, 2, 8], [20, 21], [], [9, 9, 1])
    same(beam(keeping, mixed, width=7), beam(plain, mixed, width=7))
    same(beam(keeping, mixed, width=7), beam(plain, mixed, width=7))


def test_histories_that_have_shifted_are_not_reused(setup: TinySetup, keeping: TorchEngine) -> None:
    beam(keeping, prompts_of(setup, [3, 17, 5]), width=2)
    shifted = prompts_of(setup, [17, 5, 8])
    plain = TorchEngine(setup.model, setup.tokenizer, setup.version)
    assert keeping.prefixes is not None
    same(beam(keeping, shifted, width=6), beam(plain, shifted, width=6))
    assert keeping.prefixes.hits == 0


def test_new_weights_drop_what_was_kept(keeping: TorchEngine) -> None:
    world = tiny_setup(level_size=(5, 4, 6), num_items=40, seed=8)
    engine = TorchEngine(world.model, world.tokenizer, world.version, prefix_bytes=LIMIT)
    prompts = prompts_of(world, [3, 17])
    beam(engine, prompts, width=6)
    changed = {n: w * np.float32(1.1) for n, w in snapshot(world.model).items()}
    engine.load_weights(PolicyVersion(step=2, digest="1" * 64), changed)
    assert engine.prefixes is not None
    assert (len(engine.prefixes), engine.prefixes.num_bytes) == (0, 0)
    plain = TorchEngine(world.model, world.tokenizer, world.version)
    longer = prompts_of(world, [3, 17, 6])
    same(beam(engine, longer, width=6), beam(plain, longer, width=6))


def test_the_oldest_go_where_the_bytes_are_used_up(setup: TinySetup) -> None:
    one = TorchEngine(setup.model, setup.tokenizer, setup.version, prefix_bytes=LIMIT)
    beam(one, prompts_of(setup, [1, 2]), width=2)
    assert one.prefixes is not None
    size = one.prefixes.num_bytes
    few = TorchEngine(setup.model, setup.tokenizer, setup.version, prefix_bytes=2 * size + 8)
    for history in ([1, 2], [3, 4], [5, 6], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]):
        beam(few, prompts_of(setup, history), width=2)
        assert few.prefixes is not None
        assert few.prefixes.num_bytes <= 2 * size + 8
    beam(few, prompts_of(setup, [1, 2, 3]), width=2)
    assert few.prefixes is not None
    assert few.prefixes.hits == 1  # that of [5, 6]; [1, 2] was dropped
