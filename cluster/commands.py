"""What each command does, once its configuration is resolved."""

import asyncio
import time
from pathlib import Path
from typing import Literal

import typer
from transformers.utils import logging as transformers_logging

from cluster.console import closing_table
from cluster.evaluate import evaluate, evaluation_file, look, write_metrics
from cluster.launch import House, launch
from cluster.loop import Clock, train
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

    async def work() -> None:
        clock = Clock()
        async with launch(run) as house:
            await sft(house)
            clock.lap("warm start")
            await house.turn_to(run.then("evaluate", run.result))
            found = await look(house, run.result, WARM_START)
            clock.lap("evaluation")
        closing_table({WARM_START: found}, seconds=clock.laps)

    asyncio.run(work())
    typer.echo(f"policy: {run.result}")


def improve(settings: Config, *, dry_run: bool) -> None:
    """RL, then the evaluation of where it began and of what it made of it."""
    run = prepare(settings, "train")
    if dry_run:
        return tell(run)

    async def work() -> None:
        clock = Clock()
        async with launch(run) as house:
            before, after = await train_and_compare(house, clock)
        close(run, before, after, clock.laps)

    asyncio.run(work())


async def train_and_compare(house: House, clock: Clock) -> tuple[Evaluation, Evaluation]:
    """RL in a house that is ready for it; the test evaluations before and after."""
    run = house.run
    await train(house)
    clock.lap("training")
    await house.turn_to(run.then("evaluate", run.result))
    before = await look(house, run.policy, WARM_START)
    after = await look(house, run.result, TRAINED)
    clock.lap("evaluation")
    return before, after


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
    earlier = evaluation.read(evaluation_file(run, against)) if against else None

    async def work() -> Evaluation:
        async with launch(run) as house:
            return await evaluate(house, run.policy, split=split, beams=beams, name=name)

    found = asyncio.run(work())
    if json_file is not None:
        write_metrics(found, json_file)
    shown = {against: earlier, name: found} if against and earlier else {name: found}
    closing_table(shown, seconds={"evaluation": found.seconds})


def quickstart(output: Path, overrides: list[str]) -> None:
    """World, warm start, RL, evaluation, table and report, in one house."""
    folder = output / "quickstart-data"
    settings = config.load(QUICKSTART, [f"output='{output}'", f"data.path='{folder}'", *overrides])
    everything = time.perf_counter()
    if not folder.is_dir():
        write_world(folder, WorldParams())

    async def work() -> None:
        clock, begin = Clock(), prepare(settings, "sft")
        async with launch(begin) as house:
            await sft(house)
            clock.lap("warm start")
            run = begin.then("train", begin.result)
            await house.turn_to(run)
            before, after = await train_and_compare(house, clock)
        total = {"everything": time.perf_counter() - everything}
        close(run, before, after, clock.laps | total)

    with MemoryWatch() as memory:
        asyncio.run(work())
    typer.echo(f"peak resident memory, all processes: {memory.peak_bytes / 2**30:.1f} GiB")


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
