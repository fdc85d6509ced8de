import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learner import checkpoint
from learner.advantage.estimators import ESTIMATORS
from learner.batch import sft
from learner.batch.pack import make_batch, pack
from learner.trainer import Trainer, apply_tis
from orchard.catalog.catalog import Catalog
from orchard.data.prompts import TrainingWindows
from orchard.errors import CheckpointError, UpdateError
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


def make_trainer(config: LearnerConfig = BRISK, *, total_steps: int = 100) -> Trainer:
    model, tokenizer = tiny_policy(ITEMS)
    return Trainer(model, tokenizer, config, total_steps=total_steps)


def replace_settings(config: LearnerConfig, **changes: float) -> LearnerConfig:
    return config.model_copy(update=changes)


def scored(trainer: Trainer, prompts: Prompts, catalog: Catalog = ITEMS) -> ScoredTrees:
    tokenizer = tiny_policy(catalog)[1]
    engine = TorchEngine(trainer.policy, tokenizer, FIRST)
    candidates = beam.beam(engine, prompts, width=8)
    trees = build_search_trees(prompts, candidates, tokenizer, FIRST)
    return score_trees(trees, catalog, {"rule": 1.0, "ranking": 1.0, "prefix": 0.5})


def batch(trainer: Trainer, prompts: Prompts) -> TrainBatch:
    trees = scored(trainer, prompts)
    return pack(trees, [ESTIMATORS["group"](trees, 1e-4)], tiny_policy(ITEMS)[1])


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


def test_forced_codes_count_where_the_whole_vocabulary_competes() -> None:
    assert len(windows().chosen) < len(windows(forced=True).chosen) == 24 * 3
    full = BRISK.model_copy(update={"logprob": "full"})
    trainer, rows = make_trainer(full), windows(forced=True)
    losses = [trainer.sft_step(rows)["nll"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


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


def test_a_heavier_anchor_keeps_the_policy_nearer_to_its_reference() -> None:
    def drift(weight: float) -> float:
        kl = KlConfig(weight=weight)
        trainer = make_trainer(BRISK.model_copy(update={"kl": kl}))
        prompts = tiny_prompts(ITEMS, [1, 3, 2, 2, 4, 1])
        for _ in range(15):
            metrics = trainer.rl_step(batch(trainer, prompts))
        return metrics["kl"]

    assert drift(1.0) < 0.5 * drift(1e-6)


def test_an_ema_reference_moves_and_a_fixed_one_does_not() -> None:
    for reference, moves in (("ema", True), ("fixed", False)):
        kl = KlConfig(weight=1e-3, reference=reference, ema_every=2, ema_share=0.5)
        trainer = make_trainer(BRISK.model_copy(update={"kl": kl}))
        anchor = trainer.copies["reference"].policy
        start = digest(snapshot(anchor))
        for _ in range(2):
            trainer.rl_step(batch(trainer, tiny_prompts(ITEMS, [2, 1])))
        assert (digest(snapshot(anchor)) != start) == moves


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


def test_micro_batches_give_the_update_of_the_whole() -> None:
    whole, cut = make_trainer(), make_trainer(BRISK.model_copy(update={"max_tokens": 40}))
    rows = batch(whole, tiny_prompts(ITEMS, [1, 5, 2, 7, 3]))
    whole.rl_step(rows)
    cut.rl_step(rows)
    for a, b in zip(whole.policy.parameters(), cut.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_resumed_learner_continues_bit_for_bit(tmp_path: Path) -> None:
    prompts = [tiny_prompts(ITEMS, [1, 4, 2], seed=seed) for seed in range(6)]
    straight = make_trainer()
    for group in prompts:
        straight.rl_step(batch(straight, group))

    first = make_trainer()
    for group in prompts[:3]:
        first.rl_step(batch(first, group))
    checkpoint.save(first, tmp_path, number=3, catalog=ITEMS.digest, write=True)
    second = make_trainer()
    assert checkpoint.load(second, tmp_path, catalog=ITEMS.digest) == 3
    for group in prompts[3:]:
        second.rl_step(batch(second, group))
    assert digest(snapshot(second.policy)) == digest(snapshot(straight.policy))
    assert second.updates == straight.updates


def test_a_checkpoint_of_another_catalog_or_model_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer()
    checkpoint.save(trainer, tmp_path, number=1, catalog=ITEMS.digest, write=True)
    with pytest.raises(CheckpointError, match="another"):
        checkpoint.load(trainer, tmp_path, catalog=replace(ITEMS, digest="0" * 64).digest)
    other = tiny_catalog(level_size=(5, 4, 9), num_items=40)
    model, tokenizer = tiny_policy(other)
    stranger = Trainer(model, tokenizer, BRISK, total_steps=1)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load(stranger, tmp_path, catalog=ITEMS.digest)
    with pytest.raises(CheckpointError, match=r"holds no learner\.pt"):
        checkpoint.load(trainer, tmp_path / "empty", catalog=ITEMS.digest)


def state_after(trainer: Trainer) -> str:
    """Digest of everything that an update changes."""
    tensors = [value for group in trainer.optimizer.state.values() for value in group.values()]
    moments = "".join(repr(torch.as_tensor(value).double().sum().item()) for value in tensors)
    return f"{digest(snapshot(trainer.policy))} {trainer.updates} {moments}"


def test_an_update_with_values_that_are_not_finite_is_not_applied() -> None:
    trainer = make_trainer()
    good = batch(trainer, tiny_prompts(ITEMS, [1, 4, 2]))
    trainer.rl_step(good)
    before = state_after(trainer)
    bad = replace(good, advantage_pos=np.full_like(good.advantage_pos, np.nan))
    with pytest.raises(UpdateError, match="update 2 was not applied.*advantages.*not finite"):
        trainer.rl_step(bad)
    assert state_after(trainer) == before
    trainer.rl_step(good)
    assert trainer.updates == 2


@pytest.mark.parametrize(("section", "value"), [("learner", 1e25), ("sft", 1e25)])
def test_a_rate_that_drove_the_weights_out_of_range_is_named(section: str, value: float) -> None:
    trainer = make_trainer(replace_settings(BRISK, lr=value))
    update = (
        (lambda: trainer.rl_step(good)) if section == "learner"
        else (lambda: trainer.sft_step(windows()))
    )  # fmt: skip
    good = batch(trainer, tiny_prompts(ITEMS, [1, 4, 2]))
    update()
    before = state_after(trainer)
    with pytest.raises(
        UpdateError, match=rf"1 updates at {section}.lr = 1e\+25 .* weights as large"
    ):
        update()
    assert state_after(trainer) == before
    with pytest.raises(UpdateError, match=f"after update 1 .* lower {section}.lr"):
        trainer.check_logprobs(np.array([0.5, np.nan], dtype=np.float32))


def test_a_policy_that_is_damaged_from_the_start_is_not_blamed_on_a_rate() -> None:
    trainer = make_trainer()
    with torch.no_grad():
        next(trainer.policy.parameters()).fill_(torch.nan)
    with pytest.raises(UpdateError, match="the policy that training starts from has such weights"):
        trainer.sft_step(windows())


def test_an_extended_run_follows_the_rates_of_a_run_of_the_new_length(tmp_path: Path) -> None:
    config = replace_settings(BRISK, warmup=0.1, final_lr=0.1)

    def rates(trainer: Trainer, updates: int) -> list[float]:
        return [trainer.sft_step(windows())["lr"] for _ in range(updates)]

    short, long = make_trainer(config, total_steps=4), make_trainer(config, total_steps=12)
    expected = rates(long, 12)
    assert rates(short, 4)[-1] < expected[3]
    checkpoint.save(short, tmp_path, number=4, catalog=ITEMS.digest, write=True)
    extended = make_trainer(config, total_steps=12)
    checkpoint.load(extended, tmp_path, catalog=ITEMS.digest)
    assert rates(extended, 8) == expected[4:]


def test_a_checkpoint_that_is_cut_short_is_refused_in_a_sentence(tmp_path: Path) -> None:
    trainer, file = make_trainer(), tmp_path / checkpoint.FILE
    checkpoint.save(trainer, tmp_path, number=1, catalog=ITEMS.digest, write=True)
    assert checkpoint.damage(tmp_path) == ""
    whole = file.read_bytes()
    for content, reason in (
        (whole[: len(whole) // 2], "bytes"),
        (b"", "0 of"),
        (whole[:900] + b"zorg" + whole[904:], "has changed since it was written"),
    ):
        file.write_bytes(content)
        assert reason in checkpoint.damage(tmp_path)
    for content in (whole[: len(whole) // 2], b"", b"\x80", b"no checkpoint at all"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read .* restore it from a copy"):
            checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest)


def test_a_checkpoint_of_another_version_is_refused_in_a_sentence(tmp_path: Path) -> None:
    trainer, file = make_trainer(), tmp_path / checkpoint.FILE
    checkpoint.save(trainer, tmp_path, number=1, catalog=ITEMS.digest, write=True, data="1" * 64)
    state = torch.load(file, weights_only=True)

    def changed(**values: object) -> None:
        new = {**state, **values}
        torch.save({name: value for name, value in new.items() if value is not None}, file)

    changed(format=99)
    with pytest.raises(CheckpointError, match="another version of Orchard: it has format 99"):
        checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest)
    changed(optimizer=None, updates=None)
    with pytest.raises(CheckpointError, match="it lacks optimizer, updates"):
        checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest)
    changed(format=None, data=None)  # as it was before it named either
    assert checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest, data="2" * 64) == 1
    changed()
    with pytest.raises(CheckpointError, match="was made with training rows 111111111111"):
        checkpoint.load(trainer, tmp_path, catalog=ITEMS.digest, data="2" * 64)


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    trainer, record = make_trainer(), tmp_path / checkpoint.RECORD
    assert checkpoint.recover(tmp_path) is None
    for number in (2, 4):
        folder = tmp_path / checkpoint.folder_of(number)
        folder.mkdir()
        checkpoint.save(trainer, folder, number=number, catalog=ITEMS.digest, write=True)
    listed = json.dumps({"checkpoint_results": ["job_000002", "job_000004"]})
    record.write_text(listed)
    assert checkpoint.recover(tmp_path) is None
    assert record.is_file()
    record.write_text(listed[:40])
    assert checkpoint.recover(tmp_path) == tmp_path / "job_000004"
    assert not record.exists()
    record.write_text(listed)
    newest = tmp_path / "job_000004" / checkpoint.FILE
    newest.write_bytes(newest.read_bytes()[:-1])
    assert checkpoint.recover(tmp_path) == tmp_path / "job_000002"
    assert (tmp_path / "damaged_job_000004").is_dir()
    record.write_text(listed)
    (tmp_path / "job_000002" / checkpoint.FILE).unlink()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* holds no learner\.pt"):
        checkpoint.recover(tmp_path)
    assert record.is_file()


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
