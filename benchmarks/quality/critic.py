"""Benchmark the prefix critic: RLlib's updates against the reference's, and guided search.

The run `RUN` must have been trained and its critic fitted (`docs/critic.md` has the commands), and
RLlib's requirements must be installed. Searches are compared by hits among their candidates at
equal budgets of forward tokens: with the SFT policy, which has no trained value head, and with the
RL policy and its head.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared.measure import Figure, Report, Row, figure, report
from cluster.training.run import Run, prepare
from orchard import config
from orchard.data.prompts import make_prompts
from orchard.evaluation import bootstrap
from orchard.policy import model, value_head
from orchard.scorers import prefix_critic
from orchard.scorers.fit_critic import CRITIC_BACKENDS, measure_critic, sample_trajectories
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import VedConfig
from orchard.types import PolicyVersion
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.ved.search import ved

RUN = Path("cluster/runs/critic_synthetic.toml")
SETS = ((16, 33), (32, 65))
"""Number of candidates, and the forward tokens of a beam of that width over three codes."""
SEED = 7


def run(quick: bool) -> Report:
    """Measure parity of the backends and hits among candidates; `quick` is a smoke test."""
    torch.set_num_threads(1)
    settings = config.load(RUN)
    prepared = prepare(settings, "sft")
    rows, parity = _parity(prepared, updates=5 if quick else 150, seeds=1 if quick else 3)
    critic = prefix_critic.load(
        settings.critic.path or prepared.dir / prefix_critic.KIND, prepared.catalog
    )
    for name in ("warm_start", "policy"):
        policy_run = prepare(settings, "evaluate", policy=prepared.dir / name)
        for count, budget in SETS:
            rows += _sets(policy_run, critic, count, budget, num_rows=64 if quick else 640)
    return report("critic", [parity], rows)


def _parity(prepared: Run, *, updates: int, seeds: int) -> tuple[list[Row], Figure]:
    """Train both backends from the same weights on the same walks; return rows and loss gap."""
    settings, value_settings = prepared.config.critic, prepared.config.learner.value
    rows, max_gap = list[Row](), 0.0
    for seed in range(seeds):
        loss: list[float] = []
        for name, backend in CRITIC_BACKENDS.items():
            torch.manual_seed(seed)
            critic = PrefixCritic(
                prepared.catalog, max_history=prepared.config.data.max_history,
                hidden_size=settings.hidden_size, layers=settings.layers, heads=settings.heads,
                dropout=settings.dropout,
            )  # fmt: skip
            walks = partial(
                sample_trajectories, critic, contrasts=settings.contrasts,
                level_weight=value_settings.level_weight, discount=value_settings.discount,
                draw=np.random.default_rng(seed),
            )  # fmt: skip
            held_out = [walks(prepared.valid, np.arange(min(1000, len(prepared.valid))))]
            backend_learner, order = backend(critic, settings), np.random.default_rng(seed)
            seconds: list[float] = []
            for _ in range(updates):
                batch = walks(
                    prepared.train, order.integers(0, len(prepared.train), settings.batch_size)
                )
                critic.train()
                began = time.process_time()
                backend_learner.learn(batch)
                seconds.append(time.process_time() - began)
            metrics = measure_critic(critic, held_out)
            loss.append(metrics["value_loss"])
            rows.append({"backend": name, "seed": seed, "updates": updates, **metrics,
                         "cpu_ms_per_update": 1000 * float(np.median(seconds))})  # fmt: skip
        max_gap = max(max_gap, abs(loss[0] - loss[1]))
    return rows, figure("critic_backend_gap", max_gap, "", asked="<= 0.001",
                        note=f"validation loss, {updates} updates, {seeds} seeds")  # fmt: skip


def _sets(
    prepared: Run, critic: PrefixCritic, count: int, budget: int, *, num_rows: int
) -> list[Row]:
    """Measure hits among `count` candidates of held-out prompts for each guide of the search."""
    policy = model.load(prepared.policy, prepared.tokenizer)
    engine = TorchEngine(policy, prepared.tokenizer, PolicyVersion(step=0, digest=""))
    unguided = PrefixCritic(
        prepared.catalog, max_history=1, hidden_size=2, layers=1, heads=1
    ).eval()
    settings = VedConfig(budget=budget, width=count // 2, traversals=4)
    guided = partial(ved, settings=settings, count=count, seed=SEED)
    searches: dict[str, Callable[..., Candidates]] = {
        "beam": partial(beam, width=count),
        "ved, none": partial(guided, critic=unguided),  # values every prefix at 0
        "ved, critic": partial(guided, critic=critic),
    }
    if value_head.value_head_of(policy) is not None:
        searches["ved, head"] = guided
    prompts = make_prompts(
        prepared.tokenizer, prepared.test, np.arange(min(num_rows, len(prepared.test)))
    )
    target = prepared.catalog.leaf_of_item[prompts.target]
    rows, hits = list[Row](), dict[str, np.ndarray]()
    for name, search_fn in searches.items():
        batches = [
            search_fn(engine, prompts.select(np.arange(first, min(first + 64, len(prompts)))))
            for first in range(0, len(prompts), 64)
        ]
        candidates = Candidates.concatenate(batches)
        prompt_of = np.repeat(np.arange(len(prompts)), np.diff(candidates.start))
        hit = (
            np.bincount(prompt_of[candidates.leaf == target[prompt_of]], minlength=len(prompts)) > 0
        )
        hits[name] = hit.astype(np.float64)
        change = bootstrap.estimates(
            ["hit"], (hits[name] - hits["beam"])[:, None], resamples=2000, seed=SEED
        )["hit"]
        rows.append({
            "policy": prepared.policy.name, "search": name, "candidates": count, "budget": budget,
            "prompts": len(prompts), "best_in_set": float(hits[name].mean()),
            "over_beam": change.mean, "low": change.low, "high": change.high,
            "forward_tokens": candidates.cost.forward_tokens / len(prompts),
            "leaf_tokens": candidates.cost.leaf_tokens / len(prompts),
        })  # fmt: skip
    return rows
