"""Fitting the models that rewards ask, for the data of a run."""

import time
from collections.abc import Callable

import torch
import typer
from torch import nn

from cluster.console import Progress
from cluster.prepare import Run, prepare
from orchard.config import Config
from orchard.errors import ConfigError
from orchard.settings import ScorerConfig
from rewards import evaluator, sasrec, stored
from rewards.fit import Tell, fit_sasrec, metrics_of, sasrec_ranks
from rewards.fit_listwise import fit_evaluator, measure

SHOWN = ("ndcg@10/item", "hr@10/item", "ndcg@10/sid", "hr@10/sid", "hit@1/list", "chance")


def fit(kind: str, settings: Config) -> None:
    """Fit the model of a reward, measure it on the test rows, and leave it where the reward looks.

    Raises:
        ConfigError: the reward asks no model.
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
            run.train, run.valid, run.catalogue, settings,
            max_history=length, seed=run.config.seed, tell=tell,
        )  # fmt: skip
        return model, metrics_of(sasrec_ranks(model, run.test, run.catalogue))

    _keep(run, sasrec.KIND, settings, "ndcg@10", work, {"num_items": len(run.catalogue)})


def fit_listwise(run: Run) -> None:
    """The list evaluator on the training rows, the epoch chosen on the validation rows."""
    settings, length = run.config.rewards.listwise, run.config.data.max_history

    def work(tell: Tell) -> tuple[nn.Module, dict[str, float]]:
        model = fit_evaluator(
            run.train, run.valid, run.catalogue, settings,
            max_history=length, seed=run.config.seed, tell=tell,
        )  # fmt: skip
        return model, measure(model, run.train, run.test, settings, run.config.seed)

    counts = {"num_items": len(run.catalogue), "num_leaves": run.catalogue.trie.num_leaves}
    _keep(run, evaluator.KIND, settings, "hit@1", work, counts)


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
    stored.save(
        model,
        folder,
        kind=kind,
        catalogue=run.catalogue,
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
    evaluator.KIND: fit_listwise,
}
