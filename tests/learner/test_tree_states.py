"""Hidden states of packed trees by FlexAttention against those of the dense mask.

On the CPU FlexAttention has no gradients and runs uncompiled here; `tests/integration/test_gpu.py`
compiles it and compares updates.
"""

from collections.abc import Iterator

import pytest
import torch

from learner import tree_states as tree_states_module
from learner.advantage.estimators import ESTIMATORS
from learner.batch.microbatch import without_choices
from learner.batch.pack import pack
from learner.logprobs import to_tensors
from learner.tree_states import choose_attention, tree_mask, tree_states
from orchard.errors import EngineError
from orchard.policy import flex
from orchard.testing import TinySetup, tiny_setup, with_windows
from orchard.types import ScoredTrees, TrainBatch
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def batch_of(world: TinySetup) -> TrainBatch:
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    found = beam(engine, world.prompts, width=9)
    trees = build_search_trees(world.prompts, found, world.tokenizer, world.version)
    reward = torch.rand(len(found.leaf), generator=torch.Generator().manual_seed(1)).numpy()
    scored = ScoredTrees(trees=trees, reward=reward, parts={})
    return pack(scored, [ESTIMATORS["group"](scored, 1e-4)], world.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "mistral", "gemma3"])
@pytest.mark.parametrize("block", [4, 128])
def test_flex_states_are_those_of_the_dense_mask(
    kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "BLOCK", block)  # several blocks even in tiny trees
    world = tiny_setup(lengths=(3, 17, 9))
    if kind != "full":
        world = with_windows(world, mixed=kind == "gemma3")
    batch = to_tensors(batch_of(world))
    filled = batch.subtree_end > 0
    states = []
    for enable in (False, True):
        assert not enable or flex.enable(world.model)
        with torch.no_grad():
            states.append(tree_states(world.model, batch)[filled])
    assert torch.allclose(*states, atol=2e-5)


def test_a_batch_without_slots_has_states() -> None:
    world = tiny_setup()
    batch = to_tensors(without_choices(batch_of(world)))
    batch.subtree_end.zero_()
    assert flex.enable(world.model)
    with torch.no_grad():
        hidden = tree_states(world.model, batch)
    assert hidden.shape[:2] == batch.token.shape


@pytest.mark.slow
def test_blocks_are_skipped_and_unmasked_exactly_where_the_mask_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flex, "BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        slot = torch.arange(32)
        end = slot + 1 + (torch.rand(32, generator=generator) ** 2 * (32 - slot)).long()
        config = tiny_setup().model.config
        mask = flex.block_masks(config, end, slot)
        visible = tree_mask(end[None])[0].view(8, 4, 8, 4)
        partly = torch.zeros(8, 8, dtype=torch.bool)
        wholly = torch.zeros(8, 8, dtype=torch.bool)
        for row in range(8):
            partly[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].long()] = True
            full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]]
            wholly[row, full.long()] = True
        assert torch.equal(wholly, visible.all(3).all(1))
        assert torch.equal(partly | wholly, visible.any(3).any(1))


def test_without_a_gpu_or_with_an_attention_of_its_own_a_model_keeps_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_setup().model
    choose_attention(model, "auto")
    assert not flex.is_enabled(model)
    with pytest.raises(EngineError, match='learner.attention = "flex" needs a GPU'):
        choose_attention(model, "flex")
    monkeypatch.setattr(tree_states_module, "device_of", lambda _: "cuda")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    choose_attention(model, "auto")
    assert not flex.is_enabled(model)
    with pytest.raises(EngineError, match="Qwen3ForCausalLM does not take another attention"):
        choose_attention(model, "flex")
