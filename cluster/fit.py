"""Fitting the models that rewards ask, for the data of a run."""

import time

import typer

from cluster.console import Progress
from cluster.prepare import Run, prepare
from orchard.config import Config
from orchard.errors import ConfigError
from rewards import sasrec, stored
from rewards.fit import fit_sasrec, metrics_of, sasrec_ranks

SHOWN = ("ndcg@10/item", "hr@10/item", "ndcg@10/sid", "hr@10/sid")


def fit(kind: str, settings: Config) -> None:
    """Fit the model of a reward, measure it on the test rows, and leave it where the reward looks.

    Raises:
        ConfigError: the reward asks no model.
    """
    if kind != sasrec.KIND:
        raise ConfigError(f"there is no model to fit for {kind!r}; choose {sasrec.KIND}")
    fit_collaborative(prepare(settings, "sft"))


def fit_collaborative(run: Run) -> None:
    """SASRec on the training rows, the epoch chosen on the validation rows."""
    settings, began = run.config.rewards.collaborative, time.perf_counter()
    with Progress("fitting", total=settings.epochs, shown=("loss", "ndcg@10")) as progress:

        def tell(epoch: int, loss: float, ndcg: float) -> None:
            progress.advance({"loss": loss, "ndcg@10": ndcg})

        model = fit_sasrec(
            run.train,
            run.valid,
            run.catalogue,
            settings,
            max_history=run.config.data.max_history,
            seed=run.config.seed,
            tell=tell,
        )
    facts = metrics_of(sasrec_ranks(model, run.test, run.catalogue))
    facts |= {"fit_s": time.perf_counter() - began}
    folder = settings.path or run.dir / sasrec.KIND
    stored.save(
        model,
        folder,
        kind=sasrec.KIND,
        catalogue=run.catalogue,
        sizes={
            "num_items": len(run.catalogue),
            "max_history": run.config.data.max_history,
            "hidden_size": settings.hidden_size,
            "layers": settings.layers,
            "heads": settings.heads,
        },
        facts=facts,
    )
    for name in SHOWN:
        typer.echo(f"{name:>16}  {facts[name]:.4f}  (test rows)")
    typer.echo(f"model: {folder}")
