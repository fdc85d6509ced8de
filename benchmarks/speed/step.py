"""Benchmark a whole RL step: Orchard, TRL's GRPOTrainer, and a loop over flat sequences.

The step has 32 prompts of 128 tokens, 16 candidates of three codes, rule and ranking rewards,
clipped GRPO with a divergence from a fixed reference, and AdamW; the policy is a fresh Qwen3 of the
default sizes over 20,000 random items, in float32 on two threads. All methods start with the same
weights, train on the same prompts, and are interleaved in one process.

Orchard's step is the synchronous loop without Ray: search on the torch engine, rewards, packing,
update, and the weight update with digest and probe. `benchmarks.shared.flat_loop` implements
MiniOneRec's description; `benchmarks.shared.trl_step` runs TRL in three variants. Two are TRL's
own: `generate` constrained by `prefix_allowed_tokens_fn` and by a masking logits processor. In the
third TRL gets Orchard's candidates, and performs only the rest of the step. Its vLLM modes need a
GPU or another version, and its continuous batching does not support such a constraint. TRL 1.9.2,
which computes logits at the codes only, can be installed in place of the pinned version to compare
the two. `benchmarks.shared.trl_loss` compares TRL's loss function with ours.

The baselines use micro-batches of 32 sequences: of 16, 32, 64 and 128 among the fastest for both,
on one thread of a busy machine.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.shared import trl_loss, trl_step
from benchmarks.shared.flat_loop import FlatLoop, advantages, rewards
from benchmarks.shared.hugging_face import allowed_tokens, beams
from benchmarks.shared.measure import Figure, Report, Row, figure, interleaved, report
from benchmarks.speed.learner import VERSION, Setting, default_setting, random_prompts
from cluster.training.loop import PhaseTimer
from learner.advantage.estimators import compute_advantages
from learner.batch.pack import pack
from learner.batch.sft import pack_answers
from learner.trainer import Trainer
from orchard.policy import transfer
from orchard.policy.item_tokenizer import compact_tokenizer
from orchard.policy.model import load
from orchard.policy.weights import snapshot
from orchard.settings import LearnerConfig, RolloutConfig
from orchard.testing import save_model_folder
from orchard.types import PolicyVersion, Prompts, SearchTrees
from rewards.score import score_trees
from rollout.actor import RolloutWorker
from rollout.engine.torch import TorchEngine
from rollout.probe import EXACT, LogprobProbe
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees

BATCH, LENGTH, GROUP, LEVELS, ROWS = 32, 128, 16, 3, 32
"""Number of prompts, tokens per prompt, candidates and codes; micro-batch size of the baselines."""
WEIGHTS = {"rule": 1.0, "ranking": 1.0}
# As in the quickstart: small micro-batches are faster on a CPU.
LEARNER = LearnerConfig(max_tokens=1024)
PROBED = 2
"""Number of prompts of the probe, the default of a run."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Inputs that all methods share."""

    setting: Setting
    prompts: Prompts
    prompt: Int[Tensor, "B P"]
    target: Int[Tensor, "B L"]
    folder: Path
    """Folder of the policy, and for files that the methods write."""
    threads: int

    def policy(self) -> PreTrainedModel:
        """Load a new copy of the initial policy."""
        return load(self.folder, self.setting.tokenizer)

    def rollout_worker(self) -> RolloutWorker:
        """Create the worker of a rollout actor with the initial policy."""
        config = RolloutConfig(engine="torch", group_size=GROUP, threads=self.threads)
        return RolloutWorker(config, self.folder, self.setting.tokenizer, seed=0)


class Orchard:
    """Orchard's synchronous training loop in one process."""

    def __init__(self, task: Task, config: LearnerConfig = LEARNER) -> None:
        """Create rollout worker and trainer with the task's policy."""
        setting = task.setting
        self._task, self._config = task, config
        self._rollout_worker = task.rollout_worker()
        self._learner = Trainer(task.policy(), setting.tokenizer, config, total_steps=1000)
        probed = task.prompts.select(np.arange(min(PROBED, len(task.prompts))))
        self._probed = probed
        self._answers = pack_answers(probed, setting.tokenizer, VERSION)
        self.laps: list[dict[str, float]] = []
        """Seconds of the phases of each step."""
        self.metrics: dict[str, float] = {}
        """Metrics of the newest update."""

    def step(self) -> None:
        """Run one step: search, score, pack, update the policy, update the rollout worker."""
        setting, clock = self._task.setting, PhaseTimer()
        trees = self._rollout_worker.search(self._task.prompts, len(self.laps))
        clock.mark("search_s")
        scored = score_trees(trees, setting.catalog, WEIGHTS)
        credits = compute_advantages(scored, self._config)
        batch = pack(scored, credits, setting.tokenizer)
        clock.mark("score_and_pack_s")
        self.metrics = self._learner.rl_step(batch)
        clock.mark("learn_s")
        weights = transfer.pack(snapshot(self._learner.eval_policy))
        version = PolicyVersion(step=len(self.laps) + 1, digest=transfer.digest(weights))
        target = setting.catalog.leaf_of_item[self._probed.target]
        probe = LogprobProbe(
            prompts=self._probed, leaf=target, score=self._learner.score(self._answers),
            tolerance=EXACT,
        )  # fmt: skip
        self._rollout_worker.load_weights(version, weights, probe)
        clock.mark("push_s")
        self.laps.append(clock.laps)


def run(quick: bool) -> Report:
    """Compare candidates, advantages, loss and gradients for equality, then measure time.

    `quick` takes two prompts, a smaller catalog and one thread.
    """
    batch, repeats, threads, items = (2, 1, 1, 2_000) if quick else (BATCH, 10, 2, 20_000)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="orchard-step-") as folder:
        task = _task(items, batch, Path(folder), threads)
        equal = _compare(task)
        rows, ratios = _time(task, repeats)
    conditions = f"B={batch}, P={LENGTH}, G={GROUP}, L={LEVELS}, FP32, {threads} threads"
    figures = [
        figure("equal_candidates", equal["candidates"], "share", asked="== 1",
               note="prompts whose beams are those of Hugging Face's constrained search"),
        figure("advantage_difference", equal["advantages"], "absolute", asked="<= 1e-5",
               note="largest, of the same candidates"),
        figure("loss_difference", equal["loss"], "relative", asked="<= 1e-5",
               note="packed trees against the flat loop of this repository, away from behaviour "
               "and reference"),
        figure("gradient_difference", equal["gradients"], "relative", asked="<= 1e-5",
               note="largest over the parameters: max |difference| / max |flat|"),
        figure("over_flat_loop", ratios["flat_loop"], "x", asked=">= 5",
               note=f"whole step, {conditions}"),
        *_loss_of_trl(),
        *_over_trl(ratios, conditions),
    ]  # fmt: skip
    return report("step", figures, rows)


def _loss_of_trl() -> list[Figure]:
    """Compare with the loss function of TRL, if it is installed."""
    if trl_step.installed() is None:
        return []
    with tempfile.TemporaryDirectory(prefix="orchard-step-loss-") as folder:
        difference = trl_loss.compare(Path(folder))
    note = f"packed trees against `compute_loss` of TRL {trl_step.installed()}, whole vocabulary"
    return [
        figure("trl_loss_difference", difference.loss, "relative", asked="<= 1e-5",
               note=f"{note}; {difference.clipped:.0%} of the ratios clipped"),
        figure("trl_gradient_difference", difference.gradients, "relative", asked="<= 1e-4",
               note="largest over the parameters; TRL's log-probabilities have a backward pass of "
               "their own"),
    ]  # fmt: skip


def _over_trl(ratios: dict[str, float], conditions: str) -> list[Figure]:
    """Return the figure against the faster of TRL's own variants, if TRL is installed."""
    trl_ratios = {name: ratios[name] for name in ("trl_hook", "trl_processor") if name in ratios}
    if not trl_ratios:
        return []
    fastest = min(trl_ratios, key=trl_ratios.__getitem__)
    note = f"whole step, {fastest}, TRL {trl_step.installed()}, {conditions}"
    return [figure("over_trl", trl_ratios[fastest], "x", asked=">= 3", note=note)]


def _task(num_items: int, batch: int, folder: Path, threads: int) -> Task:
    """Create random prompts, of which every other one has its target among the best beams."""
    setting = default_setting(num_items)
    catalog, tokenizer = setting.catalog, setting.tokenizer
    text_tokenizer = compact_tokenizer(catalog)
    save_model_folder(setting.model, text_tokenizer, folder)
    rng = np.random.default_rng(batch)
    prompts = random_prompts(tokenizer, batch, LENGTH, rng)
    prompt = torch.from_numpy(prompts.token.astype(np.int64)).view(batch, LENGTH)
    allowed = allowed_tokens(tokenizer)
    beam_codes = beams(setting.model, prompt, allowed, width=GROUP, levels=LEVELS)
    token_of_code = np.stack([tokenizer.tokens_at(n).numpy() for n in range(LEVELS)])
    target = prompts.target.copy()
    paths = token_of_code[np.arange(LEVELS), catalog.codes]
    for row in range(0, batch, 2):
        target_path = beam_codes[row, rng.integers(GROUP)].numpy()
        target[row] = np.flatnonzero((paths == target_path).all(1))[0]
    return Task(
        setting=setting, prompts=replace(prompts, target=target), prompt=prompt,
        target=torch.from_numpy(paths[target]), folder=folder, threads=threads,
    )  # fmt: skip


def _compare(task: Task) -> dict[str, float]:
    """Measure the differences between Orchard and the flat loop in one update.

    The policy differs from the reference and from the search's log-probabilities, so that ratio,
    clip and divergence all matter; the learning rate is 0.
    """
    setting, frozen_config = task.setting, LEARNER.model_copy(update={"lr": 0.0, "grad_clip": 0.0})
    catalog, tokenizer = setting.catalog, setting.tokenizer
    trees = task.rollout_worker().search(task.prompts, 0)
    rng = np.random.default_rng(0)
    behavior_logprob = trees.logprob + rng.normal(0, 0.3, len(trees.logprob)).astype(np.float32)
    trees = replace(trees, logprob=np.where(trees.forced, trees.logprob, behavior_logprob))
    scored = score_trees(trees, catalog, WEIGHTS)
    credits = compute_advantages(scored, frozen_config)
    learner = Trainer(task.policy(), tokenizer, frozen_config, total_steps=1)
    allowed = allowed_tokens(tokenizer)
    loop = FlatLoop(task.policy(), allowed, frozen_config, group=GROUP, levels=LEVELS, rows=ROWS)
    for model in (learner.policy, loop.policy):
        _shake(model)
    codes, behaviour = _as_sequences(trees)
    beam_codes = beams(setting.model, task.prompt, allowed, width=GROUP, levels=LEVELS)
    flat_advantage = advantages(rewards(codes, task.target))
    metrics = learner.rl_step(pack(scored, credits, tokenizer))
    packed_loss = metrics["surrogate"] + frozen_config.kl.weight * metrics["kl"]
    flat_loss = loop.update(task.prompt, codes, flat_advantage, behaviour)
    equal_beams = [
        set(map(tuple, a)) == set(map(tuple, b))
        for a, b in zip(codes.tolist(), beam_codes.tolist(), strict=True)
    ]
    packed_advantage = torch.from_numpy(credits[0].advantage[:, 0]).view_as(flat_advantage)
    return {
        "candidates": float(np.mean(equal_beams)),
        "advantages": float((packed_advantage - flat_advantage).abs().max()),
        "loss": abs(packed_loss - flat_loss) / abs(flat_loss),
        "gradients": _apart(learner.policy, loop.policy),
    }


def _as_sequences(trees: SearchTrees) -> tuple[Int[Tensor, "B G L"], Tensor]:
    """Return tokens and behavior log-probabilities of every candidate."""
    token_index = trees.token_start[trees.paths()].reshape(len(trees), GROUP, LEVELS)
    return torch.from_numpy(trees.token[token_index].astype(np.int64)), torch.from_numpy(
        trees.logprob[token_index]
    )


@torch.no_grad()
def _shake(model: PreTrainedModel) -> None:
    """Add small noise to the parameters, the same on every call."""
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=1e-3)


def _apart(model_a: PreTrainedModel, model_b: PreTrainedModel) -> float:
    """Return the largest relative difference of gradients over the parameters."""
    pairs = zip(model_a.parameters(), model_b.parameters(), strict=True)
    return max(
        float((a.grad - b.grad).abs().max() / b.grad.abs().max())
        for a, b in pairs
        if a.grad is not None and b.grad is not None
    )


def _time(task: Task, repeats: int) -> tuple[list[Row], dict[str, float]]:
    """Measure the median seconds of every method, absolute and relative to Orchard's."""
    setting = task.setting
    allowed = allowed_tokens(setting.tokenizer)
    orchard = Orchard(task)
    orchard_full = Orchard(task, LEARNER.model_copy(update={"logprob": "full"}))
    loop = FlatLoop(task.policy(), allowed, LEARNER, group=GROUP, levels=LEVELS, rows=ROWS)
    cases: dict[str, Callable[[], object]] = {
        "orchard": orchard.step,
        "orchard_whole_vocabulary": orchard_full.step,
        "flat_loop": lambda: loop.step(task.prompt, task.target),
    }
    rivals = _trl(task) if trl_step.installed() else {}
    cases |= {f"trl_{way}": rival.step for way, rival in rivals.items()}
    load = os.getloadavg()[0]
    seconds = interleaved(cases, repeats=repeats)
    for rival in rivals.values():
        rival.close()
    ratios = {name: value / seconds["orchard"] for name, value in seconds.items()}
    phases = {
        name: statistics.median(lap[name] for lap in orchard.laps[1:]) for name in orchard.laps[0]
    }
    rows: list[Row] = [
        {"way": name, "step_s": seconds[name], "over_orchard": ratios[name],
         "prompts_per_s": len(task.prompts) / seconds[name]}
        for name in cases
    ]  # fmt: skip
    if not rivals:
        rows.append({
            "way": "trl", "missing": "TRL is not installed; python -m pip install --no-deps -r "
            "requirements/bench.txt adds it",
        })  # fmt: skip
    packed_tokens = orchard.metrics["forward_tokens"]
    rows.append({
        "update_tokens_packed": packed_tokens,
        "update_tokens_flat": packed_tokens * orchard.metrics["flat_over_packed"],
        "load_before": load, "load_after": os.getloadavg()[0],
    } | phases)  # fmt: skip
    return rows, ratios


def _trl(task: Task) -> dict[str, trl_step.TrlSteps]:
    """Create a TRL training of each variant."""
    setting = task.setting
    allowed = allowed_tokens(setting.tokenizer)
    text_tokenizer = compact_tokenizer(setting.catalog)
    make_steps = partial(
        trl_step.TrlSteps, tokenizer=text_tokenizer, prompt=task.prompt, target=task.target,
        allowed=allowed, config=LEARNER, folder=task.folder / "trl", group=GROUP,
        rows=min(ROWS, len(task.prompts) * GROUP),
    )  # fmt: skip
    return {
        "hook": make_steps(task.policy(), way="hook"),
        "processor": make_steps(task.policy(), way="processor"),
        "search": make_steps(task.policy(), way="search", search=partial(_search, task)),
    }


def _search(
    task: Task, policy: PreTrainedModel, prompt: Int[Tensor, "B P"]
) -> Int[Tensor, "B G L"]:
    """Run Orchard's search with TRL's policy, for prompts in TRL's order."""
    setting = task.setting
    training = policy.training
    engine = TorchEngine(policy, setting.tokenizer, VERSION)
    prompts = replace(task.prompts, token=prompt.numpy().astype(np.int32).ravel())
    candidates = beam(engine, prompts, width=GROUP)
    policy.train(training)  # TRL distinguishes a step from an evaluation by this mode
    trees = build_search_trees(prompts, candidates, setting.tokenizer, VERSION)
    return _as_sequences(trees)[0]
