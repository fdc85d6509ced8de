"""Run the commands of `orchard` from a resolved configuration."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import typer

from cluster.actors.memory import MemoryMonitor
from cluster.console import closing_table, segment_table
from cluster.planning import plan as plans
from cluster.planning import simulate as simulation
from cluster.planning.teaching import teaching_groups
from cluster.report.report import write_report
from cluster.training.checks import check_engines
from cluster.training.controller import Controller, start_controller
from cluster.training.evaluate import (
    UNSEEN,
    chosen_rows,
    evaluate,
    evaluate_split,
    evaluation_file,
    write_metrics,
    write_segments,
)
from cluster.training.loop import PhaseTimer, train
from cluster.training.run import Run, prepare
from cluster.training.sft import sft
from orchard import config
from orchard.data.synthetic import WorldParams, write_world
from orchard.errors import ConfigError
from orchard.evaluation import ranking
from orchard.evaluation.ranking import Evaluation
from orchard.settings import Config
from orchard.settings.widths import Width

WARM_START, TRAINED = "warm_start", "trained"
QUICKSTART = Path(__file__).parents[1] / "runs" / "quickstart.toml"


def warm_start(settings: Config, *, dry_run: bool) -> None:
    """Run SFT, then evaluate its policy on the test split."""
    run = prepare(settings, "sft")
    if dry_run:
        return print_dry_run(run)

    async def work() -> None:
        clock = PhaseTimer()
        async with start_controller(run) as controller:
            await sft(controller)
            clock.mark("warm start")
            await controller.start_phase(run.with_phase("evaluate", run.result))
            result = await evaluate_split(controller, run.result, WARM_START)
            clock.mark("evaluation")
        closing_table({WARM_START: result}, seconds=clock.laps)

    asyncio.run(work())
    typer.echo(f"policy: {run.result}")


def improve(settings: Config, *, dry_run: bool) -> None:
    """Run RL, then evaluate the policies before and after it on the test split."""
    run = prepare(settings, "train")
    if dry_run:
        return print_dry_run(run)

    async def work() -> None:
        clock = PhaseTimer()
        async with start_controller(run) as controller:
            before, after = await train_and_compare(controller, clock)
        conclude(run, before, after, clock.laps)

    asyncio.run(work())


async def train_and_compare(
    controller: Controller, clock: PhaseTimer
) -> tuple[Evaluation, Evaluation]:
    """Run RL in a started controller, and return the test evaluations before and after it."""
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
    beams: Width,
    name: str,
    against: str | None,
    json_file: Path | None,
    segments: bool = False,
) -> None:
    """Evaluate one policy on one split; print the result and write it as JSON.

    With `segments`, the metrics of segments of the rows are printed as well, and written below
    `segments` in the run folder.
    """
    trained = settings.run_dir / "policy"
    run = prepare(settings, "evaluate", policy=policy or (trained if trained.is_dir() else None))
    earlier = ranking.read(evaluation_file(run, against)) if against else None
    if earlier is not None:  # before minutes of searches whose result could not be compared
        ranking.check_paired(earlier, split=getattr(run, split).digest, row=chosen_rows(run, split))

    async def work() -> dict[str, Evaluation]:
        async with start_controller(run) as controller:
            return await evaluate(controller, run.policy, split=split, beams=beams, name=name)

    results = asyncio.run(work())
    if json_file is not None:
        write_metrics(results, name, json_file)
    shown = {against: earlier, **results} if against and earlier else results
    closing_table(shown, seconds={"evaluation": results[name].seconds})
    for title, result in results.items() if segments else ():
        segment_table(title, write_segments(run, split, title, result))
    if f"{name}{UNSEEN}" in results:
        typer.echo("the lists of *_unseen and *_guided leave out the history")


def quickstart(output: Path, overrides: list[str]) -> None:
    """Generate data, then run SFT, RL, evaluation and the report in one controller."""
    output = output.expanduser()
    folder = output / "quickstart-data"
    settings = config.load(
        QUICKSTART,
        # As JSON strings, which are TOML strings, whatever characters the folder's name has.
        [f"output={json.dumps(str(output))}", f"data.path={json.dumps(str(folder))}", *overrides],
    )
    start = time.perf_counter()
    check_engines(settings, "train")
    if not folder.is_dir():
        write_world(folder, WorldParams())

    async def work() -> None:
        clock, sft_run = PhaseTimer(), prepare(settings, "sft")
        async with start_controller(sft_run) as controller:
            await sft(controller)
            clock.mark("warm start")
            run = sft_run.with_phase("train", sft_run.result)
            await controller.start_phase(run)
            before, after = await train_and_compare(controller, clock)
        total = {"everything": time.perf_counter() - start}
        conclude(run, before, after, clock.laps | total)

    with MemoryMonitor() as memory:
        asyncio.run(work())
    typer.echo(f"peak resident memory, all processes: {memory.peak_bytes / 2**30:.1f} GiB")


def conclude(run: Run, before: Evaluation, after: Evaluation, seconds: dict[str, float]) -> None:
    """Print the closing table and write the report."""
    closing_table({WARM_START: before, TRAINED: after}, seconds=seconds)
    typer.echo(f"policy: {run.result}\nreport: {write_report(run.dir)}")


def show_plan(settings: Config) -> None:
    """Print the capacity plan of a run without starting or writing anything.

    Raises:
        ConfigError: the run cannot work as configured; one sentence per reason.
    """
    run = _startable(settings)
    sizes = plans.sizes_of(run)
    typer.echo(config.dump(settings))
    capacity = plans.plan(
        settings, sizes, plans.machine_of(settings.output), plans.calibrate(run, sizes)
    )
    for line in plan_lines(run, sizes, capacity):
        typer.echo(f"# {line}")
    if capacity.refusals:
        raise ConfigError("; ".join(capacity.refusals))
    typer.echo("# the plan is feasible; nothing was started")


def show_simulation(settings: Config, assumed: Sequence[str], plot: Path | None) -> None:
    """Print a simulation of the run on 8 to 1,024 GPUs; nothing is started or measured.

    Raises:
        ConfigError: an assumption is unknown or out of bounds.
    """
    sizes = plans.sizes_of(_startable(settings))
    model = simulation.model_of(settings, sizes, assumed)
    results = [simulation.simulate(model, gpus) for gpus in simulation.GPUS]
    typer.echo("\n".join(simulation.lines(results, model)))
    if plot is not None:
        simulation.draw(plot, {f"{settings.name}, simulated": model})
        typer.echo(f"plot: {plot}")


def _startable(settings: Config) -> Run:
    """Prepare the run for its training phase, or for SFT if it has no policy yet."""
    sft_policy = settings.run_dir / "warm_start"
    has_policy = sft_policy.is_dir() or settings.model.path is not None
    return prepare(settings, "train" if has_policy else "sft")


def plan_lines(run: Run, sizes: plans.Sizes, capacity: plans.CapacityPlan) -> list[str]:
    """Describe a capacity plan, one sentence per line."""
    steps = run.config.learner.steps
    groups = teaching_groups(run.config, run.dir / "evaluation" / f"{WARM_START}.json")
    lines = [
        f"{len(run.catalog)} items, {sizes.nodes_per_level} nodes per level; "
        f"{len(run.train)} train, "
        + ("" if run.fresh is None else f"{len(run.fresh)} fresh, ")
        + f"{len(run.valid)} valid, {len(run.test)} test rows",
        f"{sizes.parameters:,} parameters; prompts of {sizes.prompt_tokens:.1f} tokens, at most "
        f"{sizes.prompt_tokens_max}",
    ]
    lines += [
        f"{group.count} x {group.name}: {group.cpus} CPU, {group.gpus:g} GPU, "
        f"{group.memory / plans.GIB:.2f} GiB each"
        for group in capacity.groups
        if group.count
    ]
    return [
        *lines,
        f"memory in all: {capacity.memory / plans.GIB:.1f} GiB; "
        f"disk: {capacity.disk / plans.GIB:.2f} GiB",
        f"a step: {capacity.prefill_tokens:.0f} prompt tokens and at most "
        f"{capacity.search_tokens:.0f} search tokens forward, "
        f"{capacity.update_tokens:.0f} in an update",
        f"estimated on this CPU without the engines' overhead: {capacity.search_s:.2f} s of search "
        f"and {capacity.update_s:.2f} s of update per step, {steps} steps in "
        f"{steps * (capacity.search_s + capacity.update_s) / 60:.1f} minutes",
        *(groups.lines(run.config) if groups is not None else ()),
    ]


def print_dry_run(run: Run) -> None:
    """Print the resolved configuration and the sizes of the data, for a dry run."""
    typer.echo(config.dump(run.config))
    trie = run.catalog.trie
    facts = {
        "items": len(run.catalog),
        "distinct sequences": trie.num_leaves,
        "levels": trie.depth,
        "train rows": len(run.train),
        **({} if run.fresh is None else {"fresh rows": len(run.fresh)}),
        "valid rows": len(run.valid),
        "test rows": len(run.test),
        "policy": run.policy,
        "run folder": run.dir,
    }
    for fact, value in facts.items():
        typer.echo(f"# {fact}: {value}")
    typer.echo("# everything checks out; nothing was started")
