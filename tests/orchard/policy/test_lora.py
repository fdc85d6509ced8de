"""Adapters: the same function when fresh, merged under the old names when trained."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.batch.sft import pack_examples
from learner.trainer import Trainer
from orchard.data.sft_tasks import SftExamples
from orchard.errors import ConfigError
from orchard.policy import lora, model
from orchard.policy.weights import Weights, restore, snapshot
from orchard.settings import LearnerConfig, LoraConfig
from orchard.testing import tiny_setup
from orchard.types import PolicyVersion

ON = LoraConfig(rank=4, targets=("q_proj", "down_proj"))


def test_a_target_that_matches_nothing_is_refused() -> None:
    world = tiny_setup()
    with pytest.raises(ConfigError, match="names query, which no linear module .* down_proj"):
        lora.attach(world.model, LoraConfig(rank=4, targets=("q_proj", "query")), seed=0)
    before = snapshot(world.model)
    lora.attach(world.model, LoraConfig(targets=("query",)), seed=0)
    assert before.keys() == snapshot(world.model).keys()


def test_trained_adapters_merge_into_a_policy_that_computes_the_same() -> None:
    world = tiny_setup()
    plain = copy.deepcopy(world.model)
    before = snapshot(plain)
    lora.attach(world.model, ON, seed=0)
    fresh = lora.snapshot(world.model)
    assert fresh.keys() == before.keys()
    assert all((fresh[name] == before[name]).all() for name in before)
    trained = {n for n, p in world.model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-1] for n in trained if "lora" not in n} == {"weight"}
    assert [n for n in trained if "lora" not in n] == ["model.embed_tokens.weight"]

    form = world.tokenizer
    target = np.arange(3)
    empty = np.zeros(0, np.int32), np.zeros(4, np.int64)
    asked = form.encode_history(np.array([4, 5, 6, 7]), np.array([0, 1, 3, 4]))
    examples = SftExamples(prompt=asked, answer=empty, target=target)
    batch = pack_examples(examples, form, PolicyVersion(step=0, digest=""), forced=True)
    rates = LearnerConfig(lr=1e-2)
    learner = Trainer(world.model, world.tokenizer, rates, total_steps=9)
    losses = [learner.sft_step(batch)["nll"] for _ in range(5)]
    assert losses[-1] < losses[0]

    merged = lora.snapshot(world.model)
    changed = {name for name in before if not np.array_equal(before[name], merged[name])}
    assert changed == {"model.embed_tokens.weight"} | {
        name for name in before if "q_proj" in name or "down_proj" in name
    }
    restore(plain, merged)
    token = torch.from_numpy(asked[0].astype(np.int64))[None]
    world.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            plain(token).logits, world.model(token).logits, atol=1e-5, rtol=0
        )


def moved(base: model.PreTrainedModel, *, seed: int) -> tuple[model.PreTrainedModel, Weights]:
    """The base after a training that moved all its fresh adapters and embeddings; merged."""
    adapted, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    lora.attach(adapted, ON, seed=seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    merged = copy.deepcopy(base)
    restore(merged, lora.snapshot(adapted))
    return merged, lora.factors(adapted)


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_apart_from_the_policy_make_it_of_its_base_again(
    tied: bool, tmp_path: Path
) -> None:
    from peft import PeftModel

    world = tiny_setup()
    own = world.model.config
    settings = {**own.to_dict(), "tie_word_embeddings": tied}
    base = type(world.model)(type(own).from_dict(settings))
    base.load_state_dict(world.model.state_dict(), strict=False)
    base.save_pretrained(tmp_path / "base")
    size = world.tokenizer.size + 3
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(size, mean_resizing=False)
    warm, first = moved(grown, seed=0)
    trained, second = moved(warm, seed=1)
    token = torch.randint(size, (2, 9), generator=torch.Generator().manual_seed(0))
    for policy, adapter in ((warm, first), (trained, lora.stack(first, second))):
        out = tmp_path / f"{len(adapter)}-{policy is warm}"
        with torch.no_grad():
            known = policy.eval()(token).logits.log_softmax(-1)
        lora.export(copy.deepcopy(policy), adapter, out, base="base")
        loaded = model.load(tmp_path / "base")
        loaded.resize_token_embeddings(size, mean_resizing=False)
        again = PeftModel.from_pretrained(loaded, str(out)).eval()
        with torch.no_grad():
            found = again(token).logits.log_softmax(-1)
        torch.testing.assert_close(found, known, atol=1e-5, rtol=0)
        assert not torch.equal(loaded(token).logits, grown(token).logits)


def test_a_policy_that_trains_every_weight_has_no_factors() -> None:
    assert lora.factors(tiny_setup().model) == {}
