"""The prefix critic: RLlib's updates beside the reference's, and what it brings to a guided search.

For the run `RUN`, which must have been trained and its critic fitted (`docs/critic.md` has the
commands), with RLlib's requirements installed. The sets of candidates that each way finds are
compared by hits among them, at equal budgets of forward tokens: once with the warm start, beside
which no head has learnt, and once with the trained policy and its head.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared.measure import Figure, Report, Row, figure, report
from cluster.cli.fit import BACKENDS
from cluster.training.run import Run, prepare
from orchard import config
from orchard.data.prompts import make_prompts
from orchard.evaluation import bootstrap
from orchard.policy import model, value_head
from orchard.scorers import prefix_critic
from orchard.scorers.fit_critic import measure_critic, sample_trajectories
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import VedConfig
from orchard.types import PolicyVersion
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.ved.search import ved

RUN = Path("cluster/runs/critic_synthetic.toml")
SETS = ((16, 33), (32, 65))
"""Candidates of a set, and the tokens of a beam of as many over three codes."""
SEED = 7


def run(quick: bool) -> Report:
    """Parity of the backends, and hits among candidates; `quick` shows only that it works."""
    torch.set_num_threads(1)
    settings = config.load(RUN)
    at = prepare(settings, "sft")
    rows, parity = _parity(at, updates=5 if quick else 150, seeds=1 if quick else 3)
    judge = prefix_critic.load(settings.critic.path or at.dir / prefix_critic.KIND, at.catalog)
    for name in ("warm_start", "policy"):
        begun = prepare(settings, "evaluate", policy=at.dir / name)
        for count, budget in SETS:
            rows += _sets(begun, judge, count, budget, num_rows=64 if quick else 640)
    return report("critic", [parity], rows)


def _parity(at: Run, *, updates: int, seeds: int) -> tuple[list[Row], Figure]:
    """Both backends from the same weights on the same walks."""
    settings, rewards = at.config.critic, at.config.learner.value
    rows, gap = list[Row](), 0.0
    for seed in range(seeds):
        loss: list[float] = []
        for name, backend in BACKENDS.items():
            torch.manual_seed(seed)
            made = PrefixCritic(
                at.catalog, max_history=at.config.data.max_history,
                hidden_size=settings.hidden_size, layers=settings.layers, heads=settings.heads,
                dropout=settings.dropout,
            )  # fmt: skip
            walks = partial(
                sample_trajectories, made, contrasts=settings.contrasts,
                level_weight=rewards.level_weight, discount=rewards.discount,
                draw=np.random.default_rng(seed),
            )  # fmt: skip
            held_out = [walks(at.valid, np.arange(min(1000, len(at.valid))))]
            learner, order = backend(made, settings), np.random.default_rng(seed)
            seconds: list[float] = []
            for _ in range(updates):
                batch = walks(at.train, order.integers(0, len(at.train), settings.batch_size))
                made.train()
                began = time.process_time()
                learner.learn(batch)
                seconds.append(time.process_time() - began)
            found = measure_critic(made, held_out)
            loss.append(found["value_loss"])
            rows.append({"backend": name, "seed": seed, "updates": updates, **found,
                         "cpu_ms_per_update": 1000 * float(np.median(seconds))})  # fmt: skip
        gap = max(gap, abs(loss[0] - loss[1]))
    return rows, figure("critic_backend_gap", gap, "", asked="<= 0.001",
                        note=f"validation loss, {updates} updates, {seeds} seeds")  # fmt: skip


def _sets(at: Run, judge: PrefixCritic, count: int, budget: int, *, num_rows: int) -> list[Row]:
    """Hits among `count` candidates of held-out prompts, by who guides."""
    policy = model.load(at.policy, at.tokenizer)
    engine = TorchEngine(policy, at.tokenizer, PolicyVersion(step=0, digest=""))
    unguided = PrefixCritic(at.catalog, max_history=1, hidden_size=2, layers=1, heads=1).eval()
    settings = VedConfig(budget=budget, width=count // 2, traversals=4)
    guided = partial(ved, settings=settings, count=count, seed=SEED)
    searches: dict[str, Callable[..., Candidates]] = {
        "beam": partial(beam, width=count),
        "ved, none": partial(guided, critic=unguided),  # values every prefix at 0
        "ved, critic": partial(guided, critic=judge),
    }
    if value_head.value_head_of(policy) is not None:
        searches["ved, head"] = guided
    prompts = make_prompts(at.tokenizer, at.test, np.arange(min(num_rows, len(at.test))))
    target = at.catalog.leaf_of_item[prompts.target]
    rows, hits = list[Row](), dict[str, np.ndarray]()
    for name, find in searches.items():
        parts = [
            find(engine, prompts.select(np.arange(first, min(first + 64, len(prompts)))))
            for first in range(0, len(prompts), 64)
        ]
        found = Candidates.concatenate(parts)
        owner = np.repeat(np.arange(len(prompts)), np.diff(found.start))
        hit = np.bincount(owner[found.leaf == target[owner]], minlength=len(prompts)) > 0
        hits[name] = hit.astype(np.float64)
        change = bootstrap.estimates(
            ["hit"], (hits[name] - hits["beam"])[:, None], resamples=2000, seed=SEED
        )["hit"]
        rows.append({
            "policy": at.policy.name, "search": name, "candidates": count, "budget": budget,
            "prompts": len(prompts), "best_in_set": float(hits[name].mean()),
            "over_beam": change.mean, "low": change.low, "high": change.high,
            "forward_tokens": found.cost.forward_tokens / len(prompts),
            "leaf_tokens": found.cost.leaf_tokens / len(prompts),
        })  # fmt: skip
    return rows
