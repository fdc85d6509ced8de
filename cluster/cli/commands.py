"""What each command does, once its configuration is resolved."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import typer
from transformers.utils import logging as transformers_logging

from cluster.actors.memory import MemoryMonitor
from cluster.console import closing_table
from cluster.planning import plan as plans
from cluster.planning import simulate as simulation
from cluster.report.report import write_report
from cluster.training.controller import Controller, start_controller
from cluster.training.evaluate import evaluate, evaluate_split, evaluation_file, write_metrics
from cluster.training.loop import PhaseTimer, train
from cluster.training.run import Run, check_engines, prepare
from cluster.training.sft import sft
from orchard import config
from orchard.data.synthetic import WorldParams, write_world
from orchard.errors import ConfigError
from orchard.evaluation import ranking
from orchard.evaluation.ranking import Evaluation
from orchard.settings import Config

# Orchard's own bars tell how far a run is; those of single weight files only break them up.
transformers_logging.disable_progress_bar()

WARM_START, TRAINED = "warm_start", "trained"
QUICKSTART = Path(__file__).parents[1] / "runs" / "quickstart.toml"


def warm_start(settings: Config, *, dry_run: bool) -> None:
    """Warm start, then its evaluation on the test split."""
    run = prepare(settings, "sft")
    if dry_run:
        return tell(run)

    async def work() -> None:
        clock = PhaseTimer()
        async with start_controller(run) as controller:
            await sft(controller)
            clock.mark("warm start")
            await controller.start_phase(run.with_phase("evaluate", run.result))
            found = await evaluate_split(controller, run.result, WARM_START)
            clock.mark("evaluation")
        closing_table({WARM_START: found}, seconds=clock.laps)

    asyncio.run(work())
    typer.echo(f"policy: {run.result}")


def improve(settings: Config, *, dry_run: bool) -> None:
    """RL, then the evaluation of where it began and of what it made of it."""
    run = prepare(settings, "train")
    if dry_run:
        return tell(run)

    async def work() -> None:
        clock = PhaseTimer()
        async with start_controller(run) as controller:
            before, after = await train_and_compare(controller, clock)
        conclude(run, before, after, clock.laps)

    asyncio.run(work())


async def train_and_compare(
    controller: Controller, clock: PhaseTimer
) -> tuple[Evaluation, Evaluation]:
    """RL in a controller that is ready for it; the test evaluations before and after."""
    run = controller.run
    await train(controller)
    clock.mark("training")
    await controller.start_phase(run.with_phase("evaluate", run.result))
    before = await evaluate_split(controller, run.policy, WARM_START)
    after = await evaluate_split(controller, run.result, TRAINED)
    clock.mark("evaluation")
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
    earlier = ranking.read(evaluation_file(run, against)) if against else None

    async def work() -> Evaluation:
        async with start_controller(run) as controller:
            return await evaluate(controller, run.policy, split=split, beams=beams, name=name)

    found = asyncio.run(work())
    if json_file is not None:
        write_metrics(found, json_file)
    shown = {against: earlier, name: found} if against and earlier else {name: found}
    closing_table(shown, seconds={"evaluation": found.seconds})


def quickstart(output: Path, overrides: list[str]) -> None:
    """World, warm start, RL, evaluation, table and report, in one controller."""
    folder = output / "quickstart-data"
    settings = config.load(QUICKSTART, [f"output='{output}'", f"data.path='{folder}'", *overrides])
    everything = time.perf_counter()
    check_engines(settings, "train")
    if not folder.is_dir():
        write_world(folder, WorldParams())

    async def work() -> None:
        clock, begin = PhaseTimer(), prepare(settings, "sft")
        async with start_controller(begin) as controller:
            await sft(controller)
            clock.mark("warm start")
            run = begin.with_phase("train", begin.result)
            await controller.start_phase(run)
            before, after = await train_and_compare(controller, clock)
        total = {"everything": time.perf_counter() - everything}
        conclude(run, before, after, clock.laps | total)

    with MemoryMonitor() as memory:
        asyncio.run(work())
    typer.echo(f"peak resident memory, all processes: {memory.peak_bytes / 2**30:.1f} GiB")


def conclude(run: Run, before: Evaluation, after: Evaluation, seconds: dict[str, float]) -> None:
    """The closing table and the report."""
    closing_table({WARM_START: before, TRAINED: after}, seconds=seconds)
    typer.echo(f"policy: {run.result}\nreport: {write_report(run.dir)}")


def show_plan(settings: Config) -> None:
    """What a run would take; nothing is started or written.

    Raises:
        ConfigError: it cannot work as written, with a sentence for each reason.
    """
    run = _startable(settings)
    sizes = plans.sizes_of(run)
    typer.echo(config.dump(settings))
    found = plans.plan(
        settings, sizes, plans.machine_of(settings.output), plans.calibrate(run, sizes)
    )
    for line in plan_lines(run, sizes, found):
        typer.echo(f"# {line}")
    if found.refusals:
        raise ConfigError("; ".join(found.refusals))
    typer.echo("# nothing stands against it; nothing was started")


def show_simulation(settings: Config, assumed: Sequence[str], plot: Path | None) -> None:
    """What a model of the run's queues says of 8 to 1,024 GPUs; nothing is started or measured.

    Raises:
        ConfigError: an assumption is unknown or out of bounds.
    """
    sizes = plans.sizes_of(_startable(settings))
    model = simulation.model_of(settings, sizes, assumed)
    found = [simulation.simulate(model, gpus) for gpus in simulation.GPUS]
    typer.echo("\n".join(simulation.lines(found, model)))
    if plot is not None:
        simulation.draw(plot, {f"{settings.name}, simulated": model})
        typer.echo(f"plot: {plot}")


def _startable(settings: Config) -> Run:
    """The run in its training phase, or in its warm start where it has no policy yet."""
    warm = settings.run_dir / "warm_start"
    known = warm.is_dir() or settings.model.path is not None
    return prepare(settings, "train" if known else "sft")


def plan_lines(run: Run, sizes: plans.Sizes, found: plans.CapacityPlan) -> list[str]:
    """A plan in words."""
    steps = run.config.learner.steps
    lines = [
        f"{len(run.catalog)} items, {sizes.nodes_per_level} nodes per level; "
        f"{len(run.train)} train, {len(run.valid)} valid, {len(run.test)} test rows",
        f"{sizes.parameters:,} parameters; prompts of {sizes.prompt_tokens:.1f} tokens, at most "
        f"{sizes.prompt_tokens_max}",
    ]
    lines += [
        f"{room.count} x {room.name}: {room.cpus} CPU, {room.gpus:g} GPU, "
        f"{room.memory / plans.GIB:.2f} GiB each"
        for room in found.groups
    ]
    return [
        *lines,
        f"memory in all: {found.memory / plans.GIB:.1f} GiB; "
        f"disk: {found.disk / plans.GIB:.2f} GiB",
        f"a step: {found.prefill_tokens:.0f} prompt tokens and at most "
        f"{found.search_tokens:.0f} search tokens forward, {found.update_tokens:.0f} in an update",
        f"estimated on this CPU, engines' own speed aside: {found.search_s:.2f} s of search and "
        f"{found.update_s:.2f} s of update a step, {steps} steps in "
        f"{steps * (found.search_s + found.update_s) / 60:.1f} minutes",
    ]


def tell(run: Run) -> None:
    """A dry run's findings: the resolved configuration and what was found in the data."""
    typer.echo(config.dump(run.config))
    trie = run.catalog.trie
    facts = {
        "items": len(run.catalog),
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
