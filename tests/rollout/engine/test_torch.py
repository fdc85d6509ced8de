"""The reference engine: spans, states, and the weights it answers with."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from orchard.errors import CheckpointError, EngineError
from orchard.policy import value_head, weights
from orchard.policy.model import hidden_states
from orchard.testing import TinySetup, tiny_setup, with_windows
from orchard.types import PolicyVersion
from rollout.engine.protocol import DecodingBackend, NextCodeLogprobs
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam


def extend(
    engine: DecodingBackend, state: torch.Tensor, paths: list[list[int]]
) -> NextCodeLogprobs:
    """Append the codes into the nodes of each path."""
    start = torch.tensor([0, *np.cumsum([len(path) for path in paths])])
    nodes = torch.tensor([node for path in paths for node in path])
    token = engine.tokenizer.token_of(nodes)
    return engine.extend(state, token, start, torch.tensor([path[-1] for path in paths]))


def inner_paths(engine: DecodingBackend) -> list[list[int]]:
    """Paths of two nodes, the second with a choice of children."""
    trie = engine.trie
    nodes = torch.arange(int(trie.level_start[2]), int(trie.level_start[3]))
    return trie.path(nodes[trie.num_children(nodes) > 1])[:, :2].tolist()


def test_a_span_is_worth_its_codes_one_by_one(world: TinySetup, engine: TorchEngine) -> None:
    paths = inner_paths(engine)
    root = engine.prefill(world.prompts).state[2].repeat(len(paths))
    whole = extend(engine, root, paths)
    first = extend(engine, root, [path[:1] for path in paths])
    second = extend(engine, first.state, [path[1:] for path in paths])
    assert torch.allclose(whole.logprob, second.logprob, atol=1e-5)


def test_states_outlive_later_ones_and_prompts_may_come_in_any_order(
    world: TinySetup, engine: TorchEngine
) -> None:
    paths = inner_paths(engine)[:2]
    roots = engine.prefill(world.prompts).state
    early = extend(engine, roots, [paths[0][:1]] * 4)
    extend(engine, early.state[[1, 1, 3]], [paths[0][1:]] * 3)
    order = torch.tensor([3, 0, 2, 1])
    late = extend(engine, early.state[order], [paths[0][1:]] * 4)
    straight = extend(engine, roots, [paths[0]] * 4)
    width = len(straight.logprob) // 4
    expected = straight.logprob.view(4, width)[order]
    assert torch.allclose(late.logprob.view(4, width), expected, atol=1e-5)


def test_installed_weights_answer_from_then_on(
    torch_engine: Callable[[TinySetup], TorchEngine],
) -> None:
    world, other = tiny_setup(), tiny_setup(seed=9)
    engine, new = torch_engine(world), weights.snapshot(other.model)
    before = beam(engine, world.prompts, width=100)
    version = PolicyVersion(step=3, digest=weights.digest(new))
    engine.load_weights(version, new)
    assert engine.version is version
    after = beam(engine, world.prompts, width=100).select(np.array([1]))
    expected = world.leaf_logprob[1]  # by the model that was changed in place
    assert np.allclose(after.score, expected[after.leaf], atol=1e-5)
    assert not np.allclose(before.select(np.array([1])).score, after.score, atol=0.1)


def test_parameters_that_have_not_changed_are_left_alone(
    torch_engine: Callable[[TinySetup], TorchEngine],
) -> None:
    world, other = tiny_setup(), tiny_setup(seed=9)
    engine, new = torch_engine(world), weights.snapshot(other.model)
    before = weights.snapshot(world.model)
    name = next(name for name in new if "q_proj" in name)
    engine.load_changed_weights(PolicyVersion(step=3, digest=""), new, {name})
    after = weights.snapshot(world.model)
    changed = {n for n, value in after.items() if not np.array_equal(value, before[n])}
    assert changed == {name}
    assert np.array_equal(after[name], new[name])


def test_weights_of_another_model_are_refused(
    torch_engine: Callable[[TinySetup], TorchEngine],
) -> None:
    world = tiny_setup()
    engine = torch_engine(world)
    foreign = weights.snapshot(tiny_setup(level_size=(5, 4, 7)).model)
    with pytest.raises(CheckpointError, match="belong to another model"):
        engine.load_weights(PolicyVersion(step=1, digest=weights.digest(foreign)), foreign)


def test_bfloat16_stays_near_float32(torch_engine: Callable[[TinySetup], TorchEngine]) -> None:
    world = tiny_setup()
    exact = beam(torch_engine(world), world.prompts, width=100)
    world.model.to(torch.bfloat16)
    rough = beam(torch_engine(world), world.prompts, width=100)
    for prompt in range(len(world.prompts)):
        one, other = (c.select(np.array([prompt])) for c in (exact, rough))
        assert np.allclose(
            one.score[one.leaf.argsort()], other.score[other.leaf.argsort()], atol=0.3
        )


def test_values_are_those_of_the_whole_prefix_read_at_once(
    torch_engine: Callable[[TinySetup], TorchEngine],
) -> None:
    world = tiny_setup()
    plain = torch_engine(world)
    assert plain.prefill(world.prompts).value is None
    value_head.attach(world.model, seed=0)
    head = value_head.value_head_of(world.model)
    assert head is not None
    for parameter in head.parameters():
        parameter.data.normal_(0.0, 0.5)
    engine, trie = torch_engine(world), world.catalog.trie
    roots = engine.prefill(world.prompts).state
    leaves = [[n for n in row if n >= 0] for row in trie.path(trie.leaf_node[:4]).tolist()]
    first = extend(engine, roots, [leaf[:1] for leaf in leaves])
    found = extend(engine, first.state[[2, 0, 3, 1]], [leaves[i][1:] for i in (2, 0, 3, 1)])
    rows = np.split(world.prompts.token, world.prompts.token_start[1:-1])
    for state, prompt, depth in [(first, p, 1) for p in range(4)] + [
        (found, p, 3) for p in range(4)
    ]:
        codes = world.tokenizer.token_of(torch.tensor(leaves[prompt][:depth]))
        token = torch.tensor([*rows[prompt].tolist(), *codes.tolist()])[None]
        visible = torch.ones(token.shape[1], token.shape[1], dtype=torch.bool).tril()[None]
        hidden = hidden_states(world.model, token, torch.arange(token.shape[1])[None], visible)[0]
        path = torch.arange(token.shape[1] - depth - 1, token.shape[1])[None]
        place = prompt if depth == 1 else [2, 0, 3, 1].index(prompt)
        assert state.value is not None
        assert torch.isclose(head(hidden, path)[0], state.value[place], atol=1e-5)


@pytest.mark.parametrize("mixed", [False, True], ids=["mistral", "gemma3"])
def test_windows_shorter_than_the_prompt_are_the_models_own(*, mixed: bool) -> None:
    world = with_windows(tiny_setup(lengths=(0, 3, 1, 7)), mixed=mixed)  # prompts of 1 to 22 tokens
    found = beam(TorchEngine(world.model, world.tokenizer, world.version), world.prompts, width=99)
    for prompt, expected in enumerate(world.leaf_logprob):
        one = found.select(np.array([prompt]))
        assert np.allclose(one.score[one.leaf.argsort()], expected, atol=1e-5)


def test_a_model_that_a_cache_of_branches_does_not_reproduce_is_refused() -> None:
    world = tiny_setup()
    config = BertConfig(
        vocab_size=world.tokenizer.size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    encoder = AutoModelForCausalLM.from_config(config)
    with pytest.raises(EngineError, match=r"type bert gives .* nats from its own forward pass"):
        TorchEngine(encoder, world.tokenizer, world.version)
