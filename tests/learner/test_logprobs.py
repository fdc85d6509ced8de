"""Log-probabilities of packed trees under policies whose layers have windows."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from learner.advantage.estimators import ESTIMATORS
from learner.batch.pack import pack
from learner.logprob_model import LogprobModel
from learner.logprobs import to_tensors
from orchard.errors import EngineError
from orchard.testing import tiny_setup, with_windows
from orchard.types import ScoredTrees
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees


@pytest.mark.parametrize("mixed", [False, True], ids=["mistral", "gemma3"])
def test_packed_trees_have_the_log_probabilities_of_plain_forward_passes(*, mixed: bool) -> None:
    world = with_windows(tiny_setup(lengths=(3, 7)), mixed=mixed)
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    found = beam(engine, world.prompts, width=99)  # all leaves
    trees = build_search_trees(world.prompts, found, world.tokenizer, world.version)
    reward = np.random.default_rng(0).random(len(found.leaf)).astype(np.float32)
    scored = ScoredTrees(trees=trees, reward=reward, parts={})
    batch = to_tensors(pack(scored, [ESTIMATORS["group"](scored, 1e-4)], world.tokenizer))
    with torch.no_grad():
        logprob = LogprobModel(world.model, world.tokenizer, "trie")(batch)[0].numpy()
    trie = world.catalog.trie
    choice = {(int(row), int(node)): i for i, (row, node) in
              enumerate(zip(batch.row, batch.chosen, strict=True))}  # fmt: skip
    assert len(choice) == len(logprob)
    for prompt, expected in enumerate(world.leaf_logprob):
        for leaf, path in enumerate(world.leaf_path):
            # Nodes without siblings are no choices; their log-probability is 0.
            steps = [choice[prompt, node] for node in path if (prompt, node) in choice]
            assert logprob[steps].sum() == pytest.approx(expected[leaf], abs=1e-5)
    assert trie.num_leaves == len(world.leaf_path)


def test_a_policy_that_packed_trees_do_not_reproduce_is_refused() -> None:
    world = tiny_setup()
    config = BertConfig(
        vocab_size=world.tokenizer.size, hidden_size=32, intermediate_size=40,
        num_hidden_layers=1, num_attention_heads=4,
    )  # fmt: skip
    with pytest.raises(EngineError, match=r"type bert gives .* in a packed tree"):
        LogprobModel(AutoModelForCausalLM.from_config(config), world.tokenizer, "trie")
