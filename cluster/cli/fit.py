"""Fitting the models that rewards and searches ask, for the data of a run."""

import time
from collections.abc import Callable

import numpy as np
import torch
import typer
from jaxtyping import Int64
from torch import nn

from cluster.cli.rllib import RllibBackend
from cluster.console import Progress
from cluster.training.run import Run, prepare
from orchard.data.prompts import Split
from orchard.errors import ConfigError
from orchard.scorers import checkpoint, listwise_ranker, prefix_critic, sasrec
from orchard.scorers.fit_critic import (
    CriticBackend,
    TorchCriticBackend,
    Trajectories,
    sample_trajectories,
)
from orchard.scorers.fit_critic import measure_critic as measure_critic
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
from orchard.settings import Config, CriticConfig, ScorerConfig

SHOWN = ("ndcg@10/item", "hr@10/item", "ndcg@10/sid", "hr@10/sid", "hit@1/list", "chance",
         "explained", "value_loss", "choice_loss")  # fmt: skip


def fit(kind: str, settings: Config) -> None:
    """Fit a model, measure it on the test rows, and leave it where who asks it looks.

    Raises:
        ConfigError: there is no such model, or what its backend needs is not installed.
    """
    if kind not in FITS:
        raise ConfigError(f"there is no model to fit for {kind!r}; choose {' or '.join(FITS)}")
    torch.set_num_threads(settings.learner.threads)
    FITS[kind](prepare(settings, "sft"))


def fit_collaborative(run: Run) -> None:
    """SASRec on the training rows, the epoch chosen on the validation rows."""
    settings, length = run.config.rewards.collaborative, run.config.data.max_history

    def work(tell: Tell) -> tuple[nn.Module, dict[str, float]]:
        model = fit_sasrec(
            run.train, run.valid, run.catalog, settings,
            max_history=length, seed=run.config.seed, tell=tell,
        )  # fmt: skip
        return model, metrics_of(sasrec_ranks(model, run.test, run.catalog))

    _keep(run, sasrec.KIND, settings, "ndcg@10", work, {"num_items": len(run.catalog)})


def fit_listwise(run: Run) -> None:
    """The list evaluator on the training rows, the epoch chosen on the validation rows."""
    settings, length = run.config.rewards.listwise, run.config.data.max_history

    def work(tell: Tell) -> tuple[nn.Module, dict[str, float]]:
        model = fit_listwise_ranker(
            run.train, run.valid, run.catalog, settings,
            max_history=length, seed=run.config.seed, tell=tell,
        )  # fmt: skip
        return model, measure(model, run.train, run.test, settings, run.config.seed)

    counts = {"num_items": len(run.catalog), "num_leaves": run.catalog.trie.num_leaves}
    _keep(run, listwise_ranker.KIND, settings, "hit@1", work, counts)


def fit_prefix_critic(run: Run) -> None:
    """The prefix critic on walks of the training rows, the epoch chosen on the validation rows.

    Raises:
        ConfigError: items are named by titles, or what the backend needs is not installed.
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
            made = PrefixCritic(
                run.catalog,
                max_history=run.config.data.max_history,
                hidden_size=settings.hidden_size,
                layers=settings.layers,
                heads=settings.heads,
                dropout=settings.dropout,
            )
            backend: CriticBackend = BACKENDS[settings.backend](made, settings)
            draw = np.random.default_rng(run.config.seed)
            held_out = _all_trajectories(run, made, run.valid)

            def learn() -> list[float]:
                order = draw.permutation(len(run.train))
                return [
                    backend.learn(_trajectories(run, made, run.train, rows, draw))
                    for rows in batches(order, settings.batch_size)
                ]

            def judge() -> float:
                return measure_critic(made, held_out)["explained"]

            best_epoch(made, settings, learn=learn, judge=judge, tell=tell)
        return made, measure_critic(made, _all_trajectories(run, made, run.test))

    _keep(run, prefix_critic.KIND, settings, "explained", work, {})


def _trajectories(
    run: Run,
    made: PrefixCritic,
    split: Split,
    rows: Int64[np.ndarray, " R"],
    draw: np.random.Generator,
) -> Trajectories:
    value = run.config.learner.value
    return sample_trajectories(
        made, split, rows, contrasts=run.config.critic.contrasts, draw=draw,
        level_weight=value.level_weight, discount=value.discount,
    )  # fmt: skip


def _all_trajectories(run: Run, made: PrefixCritic, split: Split) -> list[Trajectories]:
    """Of every row of a split, the same whenever they are drawn."""
    draw = np.random.default_rng(run.config.seed)
    return [
        _trajectories(run, made, split, rows, draw) for rows in batches(np.arange(len(split)), 512)
    ]


def _keep(
    run: Run,
    kind: str,
    settings: ScorerConfig,
    figure: str,
    work: Callable[[Tell], tuple[nn.Module, dict[str, float]]],
    counts: dict[str, int],
) -> None:
    """Do the work under a progress bar, save what it made, and show what it came to."""
    began = time.perf_counter()
    with Progress("fitting", total=settings.epochs, shown=("loss", figure)) as progress:

        def tell(epoch: int, loss: float, found: float) -> None:
            progress.advance({"loss": loss, figure: found})

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
        facts=facts | {"fit_s": time.perf_counter() - began},
    )
    for name in SHOWN:
        if name in facts:
            typer.echo(f"{name:>16}  {facts[name]:.4f}  (test rows)")
    typer.echo(f"model: {folder}")


FITS: dict[str, Callable[[Run], None]] = {
    sasrec.KIND: fit_collaborative,
    listwise_ranker.KIND: fit_listwise,
    prefix_critic.KIND: fit_prefix_critic,
}
BACKENDS: dict[str, Callable[[PrefixCritic, CriticConfig], CriticBackend]] = {
    "torch": TorchCriticBackend,
    "rllib": RllibBackend,
}
