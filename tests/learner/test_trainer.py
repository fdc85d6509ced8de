from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learner import checkpoint
from learner.advantage.estimators import ESTIMATORS
from learner.batch import sft
from learner.batch.pack import pack
from learner.trainer import Trainer, apply_tis
from orchard.catalog.catalog import Catalog
from orchard.data.prompts import TrainingWindows
from orchard.errors import CheckpointError
from orchard.policy.model import add_dropout
from orchard.policy.weights import digest, snapshot
from orchard.settings import KlConfig, LearnerConfig
from orchard.testing import tiny_catalog, tiny_policy, tiny_prompts
from orchard.types import PolicyVersion, Prompts, ScoredTrees, TrainBatch
from rewards.score import score_trees
from rollout.engine.torch import TorchEngine
from rollout.search import beam
from rollout.search.add_target import score_leaf
from rollout.search_trees import build_search_trees

ITEMS = tiny_catalog(num_items=40)
FIRST = PolicyVersion(step=0, digest="")
BRISK = LearnerConfig(lr=3e-3, warmup=0.0, final_lr=1.0, grad_clip=1.0)


def learner(config: LearnerConfig = BRISK, *, total_steps: int = 100) -> Trainer:
    model, vocabulary = tiny_policy(ITEMS)
    return Trainer(model, vocabulary, config, total_steps=total_steps)


def scored(one: Trainer, prompts: Prompts, catalog: Catalog = ITEMS) -> ScoredTrees:
    vocabulary = tiny_policy(catalog)[1]
    engine = TorchEngine(one.policy, vocabulary, FIRST)
    found = beam.beam(engine, prompts, width=8)
    trees = build_search_trees(prompts, found, vocabulary, FIRST)
    return score_trees(trees, catalog, {"rule": 1.0, "ranking": 1.0, "prefix": 0.5})


def batch(one: Trainer, prompts: Prompts) -> TrainBatch:
    judged = scored(one, prompts)
    return pack(judged, [ESTIMATORS["group"](judged, 1e-4)], tiny_policy(ITEMS)[1])


def windows(*, forced: bool = False) -> TrainBatch:
    draw = np.random.default_rng(0)
    sequences = TrainingWindows(
        item=draw.integers(len(ITEMS), size=24),
        start=np.arange(0, 25, 4),
        fresh=np.zeros(6, np.int64),
    )
    tokenizer = tiny_policy(ITEMS)[1]
    return sft.pack_sequences(sequences, np.arange(6), tokenizer, FIRST, forced=forced)


def test_supervision_raises_the_likelihood_of_its_sequences() -> None:
    one, rows = learner(), windows()
    losses = [one.sft_step(rows)["nll"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("change", [{}, {"logprob": "full"}, {"dropout": 0.1}])
def test_rows_are_scored_as_a_search_scores_their_items(change: dict[str, object]) -> None:
    one = learner(BRISK.model_copy(update=change))
    drops = one.config.dropout
    add_dropout(one.policy, drops)
    one.policy.train()
    prompts = tiny_prompts(ITEMS, [1, 3, 2])
    tokenizer = tiny_policy(ITEMS)[1]
    rows = sft.pack_answers(prompts, tokenizer, FIRST)
    engine = TorchEngine(tiny_policy(ITEMS)[0], tokenizer, FIRST)
    found = score_leaf(engine, prompts, ITEMS.leaf_of_item[prompts.target])
    assert np.allclose(one.score(rows), found.score, atol=1e-5)


def test_forced_codes_count_where_the_whole_vocabulary_competes() -> None:
    assert len(windows().chosen) < len(windows(forced=True).chosen) == 24 * 3
    full = BRISK.model_copy(update={"logprob": "full"})
    one, rows = learner(full), windows(forced=True)
    losses = [one.sft_step(rows)["nll"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_improvement_raises_the_reward_of_what_it_saw() -> None:
    one, prompts = learner(), tiny_prompts(ITEMS, [1, 3, 2, 2, 4, 1])
    before = scored(one, prompts).reward.mean()
    for _ in range(30):
        one.rl_step(batch(one, prompts))
    assert scored(one, prompts).reward.mean() > before + 0.05


def test_the_first_ratio_of_a_fresh_batch_is_one() -> None:
    one = learner()
    metrics = one.rl_step(batch(one, tiny_prompts(ITEMS, [1, 5, 2])))
    assert metrics["logprob_gap"] < 1e-5
    assert metrics["clipped_fraction"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)


def test_the_full_vocabulary_is_compared_with_itself() -> None:
    prompts = tiny_prompts(ITEMS, [1, 5, 2])
    full = learner(BRISK.model_copy(update={"logprob": "full"}))
    rows = batch(full, prompts)
    metrics = full.rl_step(rows)
    assert metrics["logprob_gap"] < 1e-5
    under_the_trie = learner().rl_step(rows)
    assert metrics["entropy"] > under_the_trie["entropy"] + 0.1


def test_under_dropout_the_ratio_is_to_the_same_pass() -> None:
    config = BRISK.model_copy(update={"dropout": 0.3})
    one, prompts = learner(config), tiny_prompts(ITEMS, [1, 5, 2])
    rows = batch(one, prompts)
    add_dropout(one.policy, config.dropout)
    metrics = one.rl_step(rows)
    assert metrics["ratio_max"] == 1
    assert metrics["logprob_gap"] < 1e-5  # of the policy that searched: without dropout
    unlike = replace(rows, behaviour_logprob=rows.behaviour_logprob - 0.5)
    assert one.rl_step(unlike)["logprob_gap"] > 0.3


def test_improvement_may_keep_an_average() -> None:
    model, vocabulary = tiny_policy(ITEMS)
    one = Trainer(model, vocabulary, BRISK, total_steps=9, ema_decay=0.9)
    rows = batch(one, tiny_prompts(ITEMS, [1, 3, 2, 2, 4, 1]))
    first = snapshot(one.policy)
    one.rl_step(rows)
    last, kept = snapshot(one.policy), snapshot(one.result)
    for name, value in kept.items():
        assert np.allclose(value, first[name] + 9 / 11 * (last[name] - first[name]), atol=1e-6)


def test_further_updates_on_one_batch_move_the_ratio_and_meet_the_clip() -> None:
    one = learner(BRISK.model_copy(update={"lr": 0.02, "updates_per_batch": 6}))
    metrics = one.rl_step(batch(one, tiny_prompts(ITEMS, [1, 5, 2])))
    assert metrics["clipped_fraction"] > 0
    assert metrics["ratio_max"] > 1.2


def test_a_heavier_anchor_keeps_the_policy_nearer_to_its_reference() -> None:
    def drift(weight: float) -> float:
        kl = KlConfig(weight=weight)
        one = learner(BRISK.model_copy(update={"kl": kl}))
        prompts = tiny_prompts(ITEMS, [1, 3, 2, 2, 4, 1])
        for _ in range(15):
            metrics = one.rl_step(batch(one, prompts))
        return metrics["kl"]

    assert drift(1.0) < 0.5 * drift(1e-6)


def test_an_ema_reference_moves_and_a_fixed_one_does_not() -> None:
    for reference, moves in (("ema", True), ("fixed", False)):
        kl = KlConfig(weight=1e-3, reference=reference, ema_every=2, ema_share=0.5)
        one = learner(BRISK.model_copy(update={"kl": kl}))
        anchor = one.copies["reference"].policy
        start = digest(snapshot(anchor))
        for _ in range(2):
            one.rl_step(batch(one, tiny_prompts(ITEMS, [2, 1])))
        assert (digest(snapshot(anchor)) != start) == moves


def test_the_average_lags_behind_the_policy_and_is_what_is_kept() -> None:
    model, vocabulary = tiny_policy(ITEMS)
    one = Trainer(model, vocabulary, BRISK, total_steps=100, ema_decay=0.9)
    before, rows = snapshot(one.policy), windows()
    for _ in range(20):
        one.sft_step(rows)
    name = "model.embed_tokens.weight"
    kept, now = snapshot(one.result)[name], snapshot(one.policy)[name]
    travelled = np.abs(now - before[name]).sum()
    assert 0 < np.abs(kept - now).sum() < np.abs(kept - before[name]).sum() < travelled


def test_micro_batches_give_the_update_of_the_whole() -> None:
    whole, cut = learner(), learner(BRISK.model_copy(update={"max_tokens": 40}))
    rows = batch(whole, tiny_prompts(ITEMS, [1, 5, 2, 7, 3]))
    whole.rl_step(rows)
    cut.rl_step(rows)
    for a, b in zip(whole.policy.parameters(), cut.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_resumed_learner_continues_bit_for_bit(tmp_path: Path) -> None:
    prompts = [tiny_prompts(ITEMS, [1, 4, 2], seed=seed) for seed in range(6)]
    straight = learner()
    for one in prompts:
        straight.rl_step(batch(straight, one))

    first = learner()
    for one in prompts[:3]:
        first.rl_step(batch(first, one))
    checkpoint.save(first, tmp_path, number=3, catalog=ITEMS.digest, write=True)
    second = learner()
    assert checkpoint.load(second, tmp_path, catalog=ITEMS.digest) == 3
    for one in prompts[3:]:
        second.rl_step(batch(second, one))
    assert digest(snapshot(second.policy)) == digest(snapshot(straight.policy))
    assert second.updates == straight.updates


def test_a_checkpoint_of_another_catalog_or_model_is_refused(tmp_path: Path) -> None:
    one = learner()
    checkpoint.save(one, tmp_path, number=1, catalog=ITEMS.digest, write=True)
    with pytest.raises(CheckpointError, match="another"):
        checkpoint.load(one, tmp_path, catalog=replace(ITEMS, digest="0" * 64).digest)
    other = tiny_catalog(level_size=(5, 4, 9), num_items=40)
    model, vocabulary = tiny_policy(other)
    stranger = Trainer(model, vocabulary, BRISK, total_steps=1)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load(stranger, tmp_path, catalog=ITEMS.digest)
    with pytest.raises(CheckpointError, match=r"holds no learner\.pt"):
        checkpoint.load(one, tmp_path / "empty", catalog=ITEMS.digest)


def test_truncated_weights_replace_an_older_behaviour() -> None:
    one = learner()
    searched = batch(one, tiny_prompts(ITEMS, (1, 2, 3)))
    apart = np.linspace(-3, 3, len(searched.behaviour_logprob)).astype(np.float32)
    older = replace(searched, behaviour_logprob=searched.behaviour_logprob - apart)
    corrected, gap = apply_tis(older, searched.behaviour_logprob, 2.0)
    np.testing.assert_allclose(gap, 3.0, rtol=1e-5)
    weight = np.minimum(np.exp(apart), 2.0)
    np.testing.assert_allclose(corrected.advantage_pos, searched.advantage_pos * weight, rtol=1e-4)
    np.testing.assert_allclose(corrected.advantage_neg, searched.advantage_neg * weight, rtol=1e-4)
    np.testing.assert_array_equal(corrected.behaviour_logprob, searched.behaviour_logprob)
    np.testing.assert_array_equal(corrected.kl_weight, searched.kl_weight)


def test_truncation_corrects_a_stale_batch_and_leaves_a_fresh_one_alone() -> None:
    plain, corrected = learner(), learner(BRISK.model_copy(update={"tis_clip": 2.0}))
    fresh = batch(plain, tiny_prompts(ITEMS, (1, 2, 3)))
    left, right = plain.rl_step(fresh), corrected.rl_step(fresh)
    np.testing.assert_allclose(left["surrogate"], right["surrogate"], atol=1e-5)
    assert right["logprob_gap"] < 1e-5
    stale = replace(fresh, behaviour_logprob=fresh.behaviour_logprob - 3.0)
    found = learner(BRISK.model_copy(update={"tis_clip": 2.0})).rl_step(stale)
    # Every weight is at its bound, and none of the first update's ratios is at the clip.
    np.testing.assert_allclose(found["surrogate"], 2 * left["surrogate"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["logprob_gap"], 3.0, atol=1e-3)
    assert found["clipped_fraction"] == 0
