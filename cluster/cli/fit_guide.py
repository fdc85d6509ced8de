"""Fit the guide of a policy: experts counted in the training rows, weights from its beams."""

import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import typer

from cluster.console import Progress
from cluster.training.run import Run
from orchard.data.prompts import make_prompts
from orchard.guide import fit
from orchard.guide.guide import Guide
from orchard.policy.store import GUIDE, Policy
from rollout.engine.registry import ENGINES, EngineContext
from rollout.search.beam import beam


def fit_guide(run: Run) -> None:
    """Fit the guide of the run's policy, write it into the policy folder, and print its weights.

    Raises:
        DataError: no beam on the validation rows holds its target.
    """
    started, config = time.perf_counter(), run.config.guide
    counted = fit.count(run.catalog, run.leaf_rows, config.experts, most=config.pairs)
    opened = Policy.open(run.policy, run.tokenizer)
    lists = search_lists(run, opened)
    fitted = fit.fit_weights(counted, lists, ridge=config.ridge)
    guide = replace(fitted.guide, train=run.data["train"], policy=opened.version.digest)
    guide.save(run.policy / GUIDE)
    seconds = time.perf_counter() - started
    for line in describe(guide, fitted, sum(len(batch.prompts) for batch in lists), run):
        typer.echo(line)
    typer.echo(f"guide: {run.policy / GUIDE} ({seconds:.1f} s)")


def search_lists(run: Run, policy: Policy) -> list[fit.Lists]:
    """Search beams on a seeded sample of the validation rows."""
    settings = run.config.guide
    order = np.random.default_rng(run.config.seed).permutation(len(run.valid))
    rows = np.sort(order[: settings.rows])
    # On a GPU where the rollouts have one and this machine, too.
    rollout = run.config.rollout
    gpus = rollout.gpus if torch.cuda.is_available() else 0.0
    engine = ENGINES["torch"](
        EngineContext(
            folder=run.policy,
            model=policy.model,
            tokenizer=run.tokenizer,
            version=policy.version,
            config=rollout.model_copy(update={"gpus": gpus}),
            seed=run.config.seed,
        )
    )
    search_fn = partial(beam, width=settings.beams)
    size = rollout.batch_size
    lists = list[fit.Lists]()
    with Progress("searching", total=-(-len(rows) // size)) as progress:
        for first in range(0, len(rows), size):
            prompts = make_prompts(run.tokenizer, run.valid, rows[first : first + size])
            found = engine.run(search_fn, prompts)
            lists.append(
                fit.Lists(
                    prompts=prompts,
                    start=found.start,
                    leaf=found.leaf,
                    score=found.score.astype(np.float64),
                )
            )
            progress.advance()
    return lists


def describe(guide: Guide, fitted: fit.Fitted, num_rows: int, run: Run) -> list[str]:
    """Describe a fitted guide, one fact per line."""
    rate = 100 * run.leaf_rows.repeat_rate
    history = "left out of the lists" if guide.exclude_seen else "kept in the lists"
    return [
        f"{fitted.hits} of {num_rows} validation rows have their target in the beam; log p has "
        f"weight {fitted.likelihood_weight:.3f}, relative to which",
        *(f"{term.expert:>16} / {term.scale:<6g} {term.weight:+.3f}" for term in guide.terms),
        f"{'popularity':>25} {guide.popularity_weight:+.3f}",
        f"{'in the history':>25} {guide.seen_weight:+.3f}",
        f"{rate:.2f} % of the training targets are in their own history, which is {history}",
        f"{guide.num_bytes / 2**20:.1f} MiB",
    ]
