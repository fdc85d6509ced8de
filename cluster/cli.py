"""The command line. Errors are one sentence on stderr and exit code 2.

Heavy imports stay inside the commands, so that a bad configuration is refused within a second.
"""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from orchard import config
from orchard.errors import ConfigError, DataError, OrchardError

app = typer.Typer(
    help="Reinforcement learning for generative recommendation, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Make or bring data.", no_args_is_help=True)
app.add_typer(data, name="data")

RunFile = Annotated[Path, typer.Argument(help="Run file (TOML); see cluster/runs.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to it, such as learner.lr=1e-4.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Resolve and check everything, start nothing.")
]


@app.command()
def sft(run: RunFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Supervised warm start; run the same command again to resume."""
    settings = config.load(run, overrides or [])
    from cluster import commands

    commands.warm_start(settings, dry_run=dry_run)


@app.command()
def train(run: RunFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Reinforcement learning from the warm start; run the same command again to resume."""
    settings = config.load(run, overrides or [])
    from cluster import commands

    commands.improve(settings, dry_run=dry_run)


@app.command()
def evaluate(
    run: RunFile,
    overrides: Overrides = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy folder; by default the run's trained policy.")
    ] = None,
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    beams: Annotated[int | None, typer.Option(min=1, help="Width of the beam.")] = None,
    name: Annotated[str, typer.Option(help="Name of the result in the run folder.")] = "evaluated",
    against: Annotated[
        str | None, typer.Option(help="Name of an earlier evaluation to pair with.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write metric -> {mean, low, high, n} here.")
    ] = None,
) -> None:
    """HR@K, NDCG@K (semantic IDs and items), coverage, diversity and cost of a saved policy."""
    settings = config.load(run, overrides or [])
    if split not in ("valid", "test"):
        raise ConfigError(f"--split = {split!r}; choose valid or test")
    from cluster import commands

    commands.evaluate_policy(
        settings,
        policy=policy,
        split="valid" if split == "valid" else "test",
        beams=beams or settings.evaluate.beams,
        name=name,
        against=against,
        json_file=json_file,
    )


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """One self-contained HTML page about a run."""
    if not run_dir.is_dir():
        raise DataError(f"run folder {run_dir} does not exist; give the folder below runs/")
    from cluster.report import write_report

    typer.echo(f"report: {write_report(run_dir)}")


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Where the run folder goes.")] = Path("runs"),
    overrides: Overrides = None,
) -> None:
    """The whole job on synthetic data: world, warm start, RL with vLLM rollouts, evaluation."""
    from cluster import commands

    commands.quickstart(output, overrides or [])


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which figures, e.g. learner.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller run of the same code.")] = False,
) -> None:
    """The published figures, measured side by side."""
    shared = {"__init__", "measure", "recipe"}
    known = sorted({p.stem for p in Path("benchmarks").glob("*.py")} - shared)
    if name not in known:
        raise ConfigError(
            f"there is no bench {name!r}; choose from {', '.join(known) or 'none'} "
            "(benches run from the repository's root)"
        )
    result = importlib.import_module(f"benchmarks.{name}").run(quick=quick)
    text = json.dumps(result, indent=2)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(text + "\n")
    typer.echo(text)


@data.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    items: Annotated[int | None, typer.Option(min=1, help="Number of items.")] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Number of users.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """A synthetic world with structure worth learning."""
    from orchard.synth import WorldParams, write_world

    params = WorldParams(seed=seed)
    if items is not None:
        params = replace(params, num_items=items)
    if users is not None:
        params = replace(params, num_users=users)
    card = write_world(out, params, overwrite=overwrite)
    for fact, value in card.facts.items():
        typer.echo(f"{fact:>28}  {value:g}")


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 when it worked, 2 for an error that the user can act on."""
    try:
        app(args=arguments, standalone_mode=False)
    except OrchardError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:  # usage errors of the command line itself
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(2)


if __name__ == "__main__":
    main()
