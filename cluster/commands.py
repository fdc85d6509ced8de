"""What each command does, once its configuration is resolved."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import typer
from transformers.utils import logging as transformers_logging

from cluster import evaluate as evaluation_runs
from cluster.console import closing_table
from cluster.launch import cpus_needed, ray_session
from cluster.loop import train
from cluster.prepare import Run, prepare
from cluster.report import write_report
from cluster.resources import MemoryWatch
from cluster.warmup import sft
from orchard import config, evaluation
from orchard.config import Config
from orchard.evaluation import Evaluation
from orchard.synth import WorldParams, write_world

# Orchard's own bars tell how far a run is; those of single weight files only break them up.
transformers_logging.disable_progress_bar()

WARM_START, TRAINED = "warm_start", "trained"
QUICKSTART = Path(__file__).parent / "runs" / "quickstart.toml"


def warm_start(settings: Config, *, dry_run: bool) -> None:
    """Warm start, then its evaluation on the test split."""
    run = prepare(settings, "sft")
    if dry_run:
        return tell(run)
    with ray_session(settings.cluster, cpus=cpus_needed(settings)):
        seconds = timed("warm start", lambda: asyncio.run(sft(run)))
        found = look(settings, run.result, WARM_START)
    closing_table({WARM_START: found}, seconds=seconds)
    typer.echo(f"policy: {run.result}")


def improve(settings: Config, *, dry_run: bool) -> None:
    """RL, then the evaluation of where it began and of what it made of it."""
    run = prepare(settings, "train")
    if dry_run:
        return tell(run)
    with ray_session(settings.cluster, cpus=cpus_needed(settings)):
        seconds = timed("training", lambda: asyncio.run(train(run)))
        before = look(settings, run.policy, WARM_START)
        after = look(settings, run.result, TRAINED)
    close(run, before, after, seconds)


def evaluate_policy(
    settings: Config,
    *,
    policy: Path | None,
    split: Literal["valid", "test"],
    beams: int,
    name: str,
    against: str | None,
    json_file: Path | None,
) -> None:
    """One policy on one split, on the screen and as JSON."""
    trained = settings.run_dir / "policy"
    run = prepare(settings, "evaluate", policy=policy or (trained if trained.is_dir() else None))
    earlier = evaluation.read(evaluation_runs.evaluation_file(run, against)) if against else None
    found = asyncio.run(evaluation_runs.evaluate(run, split=split, beams=beams, name=name))
    if json_file is not None:
        evaluation_runs.write_metrics(found, json_file)
    shown = {against: earlier, name: found} if against and earlier else {name: found}
    closing_table(shown, seconds={"evaluation": found.seconds})


def quickstart(output: Path, overrides: list[str]) -> None:
    """World, warm start, RL, evaluation, table and report, in one Ray session."""
    folder = output / "quickstart-data"
    settings = config.load(QUICKSTART, [f"output='{output}'", f"data.path='{folder}'", *overrides])
    begin = time.perf_counter()
    if not folder.is_dir():
        write_world(folder, WorldParams())
    with MemoryWatch() as memory, ray_session(settings.cluster, cpus=cpus_needed(settings)):
        seconds = timed("warm start", lambda: asyncio.run(sft(prepare(settings, "sft"))))
        run = prepare(settings, "train")
        before = look(settings, run.policy, WARM_START)
        seconds |= timed("training", lambda: asyncio.run(train(run)))
        after = look(settings, run.result, TRAINED)
    seconds["everything"] = time.perf_counter() - begin
    close(run, before, after, seconds)
    typer.echo(f"peak resident memory, all processes: {memory.peak_bytes / 2**30:.1f} GiB")


def look(settings: Config, policy: Path, name: str) -> Evaluation:
    """The test evaluation of a policy folder, from the run folder where it is done already."""
    run = prepare(settings, "evaluate", policy=policy)
    path = evaluation_runs.evaluation_file(run, name)
    if path.is_file():
        known = evaluation.read(path)
        fresh = path.stat().st_mtime >= (policy / "policy.json").stat().st_mtime
        if fresh and known.width == settings.evaluate.beams:
            return known
    beams = settings.evaluate.beams
    return asyncio.run(evaluation_runs.evaluate(run, split="test", beams=beams, name=name))


def close(run: Run, before: Evaluation, after: Evaluation, seconds: dict[str, float]) -> None:
    """The closing table and the report."""
    closing_table({WARM_START: before, TRAINED: after}, seconds=seconds)
    typer.echo(f"policy: {run.result}\nreport: {write_report(run.dir)}")


def tell(run: Run) -> None:
    """A dry run's findings: the resolved configuration and what was found in the data."""
    typer.echo(config.dump(run.config))
    trie = run.catalogue.trie
    facts = {
        "items": len(run.catalogue),
        "distinct sequences": trie.num_leaves,
        "levels": trie.depth,
        "train rows": len(run.train),
        "valid rows": len(run.valid),
        "test rows": len(run.test),
        "policy": run.policy,
        "run folder": run.dir,
    }
    for fact, value in facts.items():
        typer.echo(f"# {fact}: {value}")
    typer.echo("# everything checks out; nothing was started")


def timed(name: str, work: Callable[[], object]) -> dict[str, float]:
    """Seconds that the work took, by its name."""
    begin = time.perf_counter()
    work()
    return {name: time.perf_counter() - begin}
