from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.batch import sft
from learner.batch.pack import make_batch
from learner.trainer import Trainer, apply_tis
from orchard.policy.model import add_dropout
from orchard.policy.weights import digest, snapshot
from orchard.settings import KlConfig
from orchard.testing import tiny_policy, tiny_prompts
from rollout.engine.torch import TorchEngine
from rollout.search.add_target import score_leaf
from tests.fixtures.trainers import BRISK, FIRST, ITEMS, batch, make_trainer, scored, windows


@pytest.mark.slow
def test_supervision_raises_the_likelihood_of_its_sequences() -> None:
    trainer, rows = make_trainer(), windows()
    losses = [trainer.sft_step(rows)["nll"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("change", [{}, {"logprob": "full"}, {"dropout": 0.1}])
def test_rows_are_scored_as_a_search_scores_their_items(change: dict[str, object]) -> None:
    trainer = make_trainer(BRISK.model_copy(update=change))
    drops = trainer.config.dropout
    add_dropout(trainer.policy, drops)
    trainer.policy.train()
    prompts = tiny_prompts(ITEMS, [1, 3, 2])
    tokenizer = tiny_policy(ITEMS)[1]
    rows = sft.pack_answers(prompts, tokenizer, FIRST)
    engine = TorchEngine(tiny_policy(ITEMS)[0], tokenizer, FIRST)
    target = score_leaf(engine, prompts, ITEMS.leaf_of_item[prompts.target])
    assert np.allclose(trainer.score(rows), target.score, atol=1e-5)


@pytest.mark.slow
def test_forced_codes_count_where_the_whole_vocabulary_competes() -> None:
    assert len(windows().chosen) < len(windows(forced=True).chosen) == 24 * 3
    full = BRISK.model_copy(update={"logprob": "full"})
    trainer, rows = make_trainer(full), windows(forced=True)
    losses = [trainer.sft_step(rows)["nll"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_improvement_raises_the_reward_of_what_it_saw() -> None:
    trainer, prompts = make_trainer(), tiny_prompts(ITEMS, [1, 3, 2, 2, 4, 1])
    before = scored(trainer, prompts).reward.mean()
    for _ in range(30):
        trainer.rl_step(batch(trainer, prompts))
    assert scored(trainer, prompts).reward.mean() > before + 0.05


def test_the_first_ratio_of_a_fresh_batch_is_one() -> None:
    trainer = make_trainer()
    metrics = trainer.rl_step(batch(trainer, tiny_prompts(ITEMS, [1, 5, 2])))
    assert metrics["logprob_gap"] < 1e-5
    assert metrics["clipped_fraction"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)


def test_the_full_vocabulary_is_compared_with_itself() -> None:
    prompts = tiny_prompts(ITEMS, [1, 5, 2])
    full = make_trainer(BRISK.model_copy(update={"logprob": "full"}))
    rows = batch(full, prompts)
    metrics = full.rl_step(rows)
    assert metrics["logprob_gap"] < 1e-5
    under_the_trie = make_trainer().rl_step(rows)
    assert metrics["entropy"] > under_the_trie["entropy"] + 0.1


def test_under_dropout_the_ratio_is_to_the_same_pass() -> None:
    config = BRISK.model_copy(update={"dropout": 0.3})
    trainer, prompts = make_trainer(config), tiny_prompts(ITEMS, [1, 5, 2])
    rows = batch(trainer, prompts)
    add_dropout(trainer.policy, config.dropout)
    metrics = trainer.rl_step(rows)
    assert metrics["ratio_max"] == 1
    assert metrics["logprob_gap"] < 1e-5  # of the policy that searched: without dropout
    unlike = replace(rows, behaviour_logprob=rows.behaviour_logprob - 0.5)
    assert trainer.rl_step(unlike)["logprob_gap"] > 0.3


def test_improvement_may_keep_an_average() -> None:
    model, tokenizer = tiny_policy(ITEMS)
    trainer = Trainer(model, tokenizer, BRISK, total_steps=9, ema_decay=0.9)
    rows = batch(trainer, tiny_prompts(ITEMS, [1, 3, 2, 2, 4, 1]))
    first = snapshot(trainer.policy)
    trainer.rl_step(rows)
    last, kept = snapshot(trainer.policy), snapshot(trainer.eval_policy)
    for name, value in kept.items():
        assert np.allclose(value, first[name] + 9 / 11 * (last[name] - first[name]), atol=1e-6)


def test_further_updates_on_one_batch_move_the_ratio_and_meet_the_clip() -> None:
    trainer = make_trainer(BRISK.model_copy(update={"lr": 0.02, "updates_per_batch": 6}))
    metrics = trainer.rl_step(batch(trainer, tiny_prompts(ITEMS, [1, 5, 2])))
    assert metrics["clipped_fraction"] > 0
    assert metrics["ratio_max"] > 1.2


@pytest.mark.slow
def test_a_heavier_anchor_keeps_the_policy_nearer_to_its_reference() -> None:
    def drift(weight: float) -> float:
        kl = KlConfig(weight=weight)
        trainer = make_trainer(BRISK.model_copy(update={"kl": kl}))
        prompts = tiny_prompts(ITEMS, [1, 3, 2, 2, 4, 1])
        for _ in range(15):
            metrics = trainer.rl_step(batch(trainer, prompts))
        return metrics["kl"]

    assert drift(1.0) < 0.5 * drift(1e-6)


@pytest.mark.slow
def test_an_ema_reference_moves_and_a_fixed_one_does_not() -> None:
    for reference, moves in (("ema", True), ("fixed", False)):
        kl = KlConfig(weight=1e-3, reference=reference, ema_every=2, ema_share=0.5)
        trainer = make_trainer(BRISK.model_copy(update={"kl": kl}))
        anchor = trainer.copies["reference"].policy
        start = digest(snapshot(anchor))
        for _ in range(2):
            trainer.rl_step(batch(trainer, tiny_prompts(ITEMS, [2, 1])))
        assert (digest(snapshot(anchor)) != start) == moves


@pytest.mark.slow
def test_the_average_lags_behind_the_policy_and_is_what_is_kept() -> None:
    model, tokenizer = tiny_policy(ITEMS)
    trainer = Trainer(model, tokenizer, BRISK, total_steps=100, ema_decay=0.9)
    before, rows = snapshot(trainer.policy), windows()
    for _ in range(20):
        trainer.sft_step(rows)
    name = "model.embed_tokens.weight"
    kept, now = snapshot(trainer.eval_policy)[name], snapshot(trainer.policy)[name]
    travelled = np.abs(now - before[name]).sum()
    assert 0 < np.abs(kept - now).sum() < np.abs(kept - before[name]).sum() < travelled


@pytest.mark.slow
def test_micro_batches_give_the_update_of_the_whole() -> None:
    whole, cut = make_trainer(), make_trainer(BRISK.model_copy(update={"max_tokens": 40}))
    rows = batch(whole, tiny_prompts(ITEMS, [1, 5, 2, 7, 3]))
    whole.rl_step(rows)
    cut.rl_step(rows)
    for a, b in zip(whole.policy.parameters(), cut.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_truncated_weights_replace_an_older_behaviour() -> None:
    trainer = make_trainer()
    searched = batch(trainer, tiny_prompts(ITEMS, (1, 2, 3)))
    log_ratio = np.linspace(-3, 3, len(searched.behaviour_logprob)).astype(np.float32)
    older = replace(searched, behaviour_logprob=searched.behaviour_logprob - log_ratio)
    corrected, gap = apply_tis(older, searched.behaviour_logprob, 2.0)
    np.testing.assert_allclose(gap, 3.0, rtol=1e-5)
    weight = np.minimum(np.exp(log_ratio), 2.0)
    np.testing.assert_allclose(corrected.advantage_pos, searched.advantage_pos * weight, rtol=1e-4)
    np.testing.assert_allclose(corrected.advantage_neg, searched.advantage_neg * weight, rtol=1e-4)
    np.testing.assert_array_equal(corrected.behaviour_logprob, searched.behaviour_logprob)
    np.testing.assert_array_equal(corrected.kl_weight, searched.kl_weight)


def test_truncation_corrects_a_stale_batch_and_leaves_a_fresh_one_alone() -> None:
    plain, truncated = make_trainer(), make_trainer(BRISK.model_copy(update={"tis_clip": 2.0}))
    fresh = batch(plain, tiny_prompts(ITEMS, (1, 2, 3)))
    left, right = plain.rl_step(fresh), truncated.rl_step(fresh)
    np.testing.assert_allclose(left["surrogate"], right["surrogate"], atol=1e-5)
    assert right["logprob_gap"] < 1e-5
    stale = replace(fresh, behaviour_logprob=fresh.behaviour_logprob - 3.0)
    metrics = make_trainer(BRISK.model_copy(update={"tis_clip": 2.0})).rl_step(stale)
    # Every weight is at its bound, and none of the first update's ratios is at the clip.
    np.testing.assert_allclose(metrics["surrogate"], 2 * left["surrogate"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["logprob_gap"], 3.0, atol=1e-3)
    assert metrics["clipped_fraction"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"logprob": "full"}, {"ratio": "sequence"}])
def test_an_anchor_raises_the_likelihood_of_targets_that_no_search_has_found(
    change: dict[str, object],
) -> None:
    settings = BRISK.model_copy(update={"anchor": 1.0, "max_tokens": 60} | change)
    trainer, prompts = make_trainer(settings), tiny_prompts(ITEMS, [1, 3, 2])
    tokenizer = tiny_policy(ITEMS)[1]
    answers = sft.pack_answers(prompts, tokenizer, FIRST)
    before = trainer.score(answers)
    for _ in range(10):
        batch = make_batch(scored(trainer, prompts), tokenizer, settings)
        metrics = trainer.rl_step(batch)
    assert metrics["target_nll"] > 0
    assert (trainer.score(answers) > before + 0.5).all()


def test_without_an_anchor_a_batch_has_no_target_codes() -> None:
    trainer, prompts = make_trainer(), tiny_prompts(ITEMS, [1, 3])
    batch = make_batch(scored(trainer, prompts), tiny_policy(ITEMS)[1], BRISK)
    assert batch.codes is None
    assert "target_nll" not in trainer.rl_step(batch)
