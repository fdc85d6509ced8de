"""Fit the models that rewards and guided searches use, on the data of a run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from jaxtyping import Int64
from torch import nn

from cluster import run_lock
from cluster.cli.fit_guide import fit_guide
from cluster.console import Progress
from cluster.training.evaluate import excludes_seen
from cluster.training.run import Run, prepare
from orchard.data.prompts import Split
from orchard.errors import ConfigError
from orchard.policy.store import GUIDE
from orchard.registry import Facts, Registry, import_plugins
from orchard.scorers import checkpoint, listwise_ranker, prefix_critic, sasrec
from orchard.scorers.fit_critic import (
    CRITIC_BACKENDS,
    CriticBackend,
    Trajectories,
    measure_critic,
    sample_trajectories,
)
from orchard.scorers.fit_listwise import fit_listwise_ranker, measure
from orchard.scorers.fit_sasrec import (
    Tell,
    batches,
    best_epoch,
    fit_sasrec,
    metrics_of,
    sasrec_ranks,
)
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import Config, ScorerConfig

SHOWN = ("ndcg@10/item", "hr@10/item", "ndcg@10/sid", "hr@10/sid", "unseen_ndcg@10/sid",
         "unseen_hr@10/sid", "hit@1/list", "chance",
         "explained", "value_loss", "choice_loss")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FitFacts(Facts):
    """Properties of a model to fit."""

    takes_policy: bool = False
    """Whether the model is fitted to a policy, in whose folder it lies, and not to rows alone."""


FITS: Registry[Callable[[Run], None], FitFacts] = Registry("model to fit", (), FitFacts())
"""Functions that fit a model, evaluate it, and save it where its users load it from."""


def fit(kind: str, settings: Config, policy: Path | None = None) -> None:
    """Fit a model on the rows of a run, or to a policy of the run, by default its newest.

    Raises:
        ConfigError: the model is unknown, or a package that its backend needs is not installed.
    """
    import_plugins(settings.plugins)
    FITS.check_name(kind, "KIND")
    torch.set_num_threads(settings.learner.threads)
    if FITS.facts(kind).takes_policy:
        trained = settings.run_dir / "policy"
        policy = policy or (trained if trained.is_dir() else None)
        return FITS[kind](prepare(settings, "evaluate", policy=policy))
    if policy is not None:
        raise ConfigError(
            f"--policy = {policy} does not apply to {kind}, which is fitted to rows only; leave it "
            "out"
        )
    with run_lock.hold(settings.run_dir):
        FITS[kind](prepare(settings, "sft"))


@FITS.register(sasrec.KIND)
def fit_collaborative(run: Run) -> None:
    """Fit SASRec on the training rows and keep the best epoch on the validation rows."""
    settings, length = run.config.rewards.collaborative, run.config.data.max_history

    def work(tell: Tell) -> tuple[nn.Module, dict[str, float]]:
        model = fit_sasrec(
            run.train, run.valid, run.catalog, settings,
            max_history=length, seed=run.config.seed, tell=tell,
        )  # fmt: skip
        facts = metrics_of(sasrec_ranks(model, run.test, run.catalog))
        if excludes_seen(run, None):
            unseen = sasrec_ranks(model, run.test, run.catalog, exclude_seen=True)
            facts |= {f"unseen_{name}": value for name, value in metrics_of(unseen).items()}
        return model, facts

    _fit_and_save(run, sasrec.KIND, settings, "ndcg@10", work, {"num_items": len(run.catalog)})


@FITS.register(listwise_ranker.KIND)
def fit_listwise(run: Run) -> None:
    """Fit the listwise ranker on the training rows; keep the best epoch on the validation rows."""
    settings, length = run.config.rewards.listwise, run.config.data.max_history

    def work(tell: Tell) -> tuple[nn.Module, dict[str, float]]:
        model = fit_listwise_ranker(
            run.train, run.valid, run.catalog, settings,
            max_history=length, seed=run.config.seed, tell=tell,
        )  # fmt: skip
        return model, measure(model, run.train, run.test, settings, run.config.seed)

    counts = {"num_items": len(run.catalog), "num_leaves": run.catalog.trie.num_leaves}
    _fit_and_save(run, listwise_ranker.KIND, settings, "hit@1", work, counts)


@FITS.register(prefix_critic.KIND)
def fit_prefix_critic(run: Run) -> None:
    """Fit the prefix critic on trajectories of the training rows; keep the best validation epoch.

    Raises:
        ConfigError: items are titles, or a package that the backend needs is not installed.
    """
    settings = run.config.critic
    if run.catalog.code_token:
        raise ConfigError(
            "the critic has an embedding for each code of each level, and titles have too many; "
            "set data.titles = false"
        )

    def work(tell: Tell) -> tuple[nn.Module, dict[str, float]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.config.seed)
            critic = PrefixCritic(
                run.catalog,
                max_history=run.config.data.max_history,
                hidden_size=settings.hidden_size,
                layers=settings.layers,
                heads=settings.heads,
                dropout=settings.dropout,
            )
            backend: CriticBackend = CRITIC_BACKENDS[settings.backend](critic, settings)
            generator = np.random.default_rng(run.config.seed)
            rows_fitted = run.known if settings.rows == "all" else run.train
            held_out = _all_trajectories(run, critic, run.valid)

            def learn() -> list[float]:
                order = generator.permutation(len(rows_fitted))
                return [
                    backend.learn(_trajectories(run, critic, rows_fitted, rows, generator))
                    for rows in batches(order, settings.batch_size)
                ]

            def score() -> float:
                return measure_critic(critic, held_out)["explained"]

            best_epoch(critic, settings, learn=learn, judge=score, tell=tell)
        return critic, measure_critic(critic, _all_trajectories(run, critic, run.test))

    _fit_and_save(run, prefix_critic.KIND, settings, "explained", work, {})


def _trajectories(
    run: Run,
    critic: PrefixCritic,
    split: Split,
    rows: Int64[np.ndarray, " R"],
    generator: np.random.Generator,
) -> Trajectories:
    """Sample trajectories of some rows, with the run's settings of rewards and contrasts."""
    value = run.config.learner.value
    return sample_trajectories(
        critic, split, rows, contrasts=run.config.critic.contrasts, draw=generator,
        level_weight=value.level_weight, discount=value.discount,
    )  # fmt: skip


def _all_trajectories(run: Run, critic: PrefixCritic, split: Split) -> list[Trajectories]:
    """Sample the trajectories of every row of a split from the run's seed, in batches."""
    generator = np.random.default_rng(run.config.seed)
    return [
        _trajectories(run, critic, split, rows, generator)
        for rows in batches(np.arange(len(split)), 512)
    ]


def _fit_and_save(
    run: Run,
    kind: str,
    settings: ScorerConfig,
    figure: str,
    work: Callable[[Tell], tuple[nn.Module, dict[str, float]]],
    counts: dict[str, int],
) -> None:
    """Fit a model under a progress bar, save it, and print its test metrics.

    `figure` names the validation metric of the progress bar, and `counts` the sizes saved with the
    model.
    """
    start = time.perf_counter()
    with Progress("fitting", total=settings.epochs, shown=("loss", figure)) as progress:

        def tell(epoch: int, loss: float, score: float) -> None:
            progress.advance({"loss": loss, figure: score})

        model, facts = work(tell)
    folder = settings.path or run.dir / kind
    checkpoint.save(
        model,
        folder,
        kind=kind,
        catalog=run.catalog,
        sizes=counts
        | {
            "max_history": run.config.data.max_history,
            "hidden_size": settings.hidden_size,
            "layers": settings.layers,
            "heads": settings.heads,
        },
        facts=facts | {"fit_s": time.perf_counter() - start},
        data=run.data if run.fresh is None else run.data | {"fresh": run.fresh.digest},
    )
    for name in SHOWN:
        if name in facts:
            typer.echo(f"{name:>18}  {facts[name]:.4f}  (test rows)")
    typer.echo(f"model: {folder}")


FITS.register(GUIDE, FitFacts(takes_policy=True))(fit_guide)
