"""The commands of `orchard`. A user error is one sentence on stderr and exit code 2.

Heavy imports stay inside the commands, so that a bad configuration is rejected within a second.
"""

import errno
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.data import data
from cluster.cli.jobs import job, submit
from cluster.cli.options import DryRun, Overrides, RunFile
from orchard import config
from orchard.errors import ConfigError, DataError, OrchardError, RunInterrupted

app = typer.Typer(
    help="Reinforcement learning for generative recommendation, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")
app.add_typer(job, name="job")
app.command()(submit)


@app.command()
def plan(
    run: RunFile,
    overrides: Overrides = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate the run on 8 to 1,024 GPUs instead.")
    ] = False,
    assume: Annotated[
        list[str] | None, typer.Option(help="Constant of the simulation, such as network_gb_s=50.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="File to plot the simulation to (.svg or .png).")
    ] = None,
) -> None:
    """Estimate memory, layout, time and disk of a run, and check it without starting it."""
    settings = config.load(run, overrides or [])
    if (assume or plot) and not simulate:
        raise ConfigError("--assume and --plot are for --simulate; add it")
    from cluster.cli import commands

    if simulate:
        commands.show_simulation(settings, assume or [], plot)
    else:
        commands.show_plan(settings)


@app.command()
def sft(run: RunFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Fine-tune the policy on user histories (SFT); run the same command again to resume."""
    settings = config.load(run, overrides or [])
    from cluster.cli import commands

    commands.warm_start(settings, dry_run=dry_run)


@app.command()
def train(run: RunFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train with RL from the SFT policy; run the same command again to resume."""
    settings = config.load(run, overrides or [])
    from cluster.cli import commands

    commands.improve(settings, dry_run=dry_run)


@app.command()
def evaluate(
    run: RunFile,
    overrides: Overrides = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy folder; the run's trained policy by default.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on: test or valid.")] = "test",
    beams: Annotated[
        int | None, typer.Option(min=1, help="Beam width; evaluate.beams by default.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the result in the run folder.")] = "evaluated",
    against: Annotated[
        str | None, typer.Option(help="Name of an earlier evaluation to compare with.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write metric -> {mean, low, high, n} to.")
    ] = None,
    segments: Annotated[
        bool,
        typer.Option(
            "--segments",
            help="Also by popularity of the target, length of the history and new users.",
        ),
    ] = False,
    logged: Annotated[
        Path | None, typer.Option(help="Evaluate off-policy, on a log of `orchard serve`.")
    ] = None,
    rewards: Annotated[
        Path | None, typer.Option(help="Rewards of the log (Parquet: request_id, item_id, reward).")
    ] = None,
) -> None:
    """Evaluate a saved policy: HR@K, NDCG@K, coverage, diversity and cost on held-out rows."""
    settings = config.load(run, overrides or [])
    if split not in ("valid", "test"):
        raise ConfigError(f"--split = {split!r}; choose valid or test", code="config.unknown_name")
    if logged is not None:
        if rewards is None:
            raise ConfigError("--logged needs --rewards, a Parquet file of what was earned")
        from cluster.cli.off_policy import evaluate_log

        evaluate_log(policy or settings.run_dir / "policy", logged, rewards, json_file)
        return
    from cluster.cli import commands

    commands.evaluate_policy(
        settings,
        policy=policy,
        split="valid" if split == "valid" else "test",
        beams=beams or settings.evaluate.beams,
        name=name,
        against=against,
        json_file=json_file,
        segments=segments,
    )


@app.command()
def fit(
    kind: Annotated[str, typer.Argument(help="collaborative, listwise, critic or guide.")],
    run: RunFile,
    overrides: Overrides = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="Policy folder of the guide; the run's latest policy by default."),
    ] = None,
) -> None:
    """Fit a reward model, a prefix critic or a guide of experts on the rows of a run."""
    settings = config.load(run, overrides or [])
    from cluster.cli.fit import fit as fit_model

    fit_model(kind, settings, policy)


@app.command()
def serve(
    target: Annotated[Path, typer.Argument(help="Run file, or policy folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to override, such as serve.port=8080.")
    ] = None,
    write_config: Annotated[
        Path | None, typer.Option(help="Write a config file for `serve deploy`, then exit.")
    ] = None,
    check_config: Annotated[
        Path | None, typer.Option(help="Check a config file for `serve deploy`, then exit.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Serve recommendations of a trained policy over HTTP on this machine."""
    from cluster.cli import serving

    if check_config is not None:
        serving.read_config(check_config)
        typer.echo(f"{check_config} checks out")
        return
    arguments, settings = serving.resolve(target, overrides or [])
    if write_config is not None or dry_run:
        text = serving.as_yaml(serving.cluster_config(arguments))
        if write_config is not None:
            write_config.write_text(text)
        typer.echo(text)
        return
    serving.serve_here(arguments, settings)


@app.command()
def loop(run: RunFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Serve, learn from what users do, and publish, in rounds; the same command resumes."""
    settings = config.load(run, overrides or [])
    from cluster.cli import serving

    serving.loop(settings, dry_run=dry_run)


@app.command()
def export(
    run: RunFile,
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    overrides: Overrides = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy folder; the run's latest policy by default.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the policy in OUT.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Export only the LoRA adapters, for peft.")
    ] = False,
) -> None:
    """Export a policy as a Hugging Face folder with catalog, value head and model card."""
    settings = config.load(run, overrides or [])
    from cluster.cli import export as exports
    from cluster.training.run import prepare

    source = policy or exports.policy_of(settings)
    prepared = prepare(settings, "evaluate", policy=source)
    exports.export_policy(prepared, out, overwrite=overwrite, adapter=adapter)
    typer.echo(f"policy: {out}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folder, or several to compare.")],
    output: Annotated[
        Path | None, typer.Option(help="Comparison page; next to the first run by default.")
    ] = None,
) -> None:
    """Write one self-contained HTML report of a run, or a comparison of several."""
    for folder in runs:
        if not folder.is_dir():
            raise DataError(
                f"run folder {folder} does not exist; give the folder below runs/",
                code="data.no_run",
            )
        if not any((folder / name).is_file() for name in ("config.toml", "metrics.jsonl")):
            raise DataError(
                f"{folder} is not a run folder: it has neither config.toml nor metrics.jsonl; give "
                "the folder below runs/",
                code="data.no_run",
            )
    if len(runs) == 1 and output is None:
        from cluster.report.report import write_report

        typer.echo(f"report: {write_report(runs[0])}")
        return
    from cluster.report.comparison import write_comparison

    page = output or runs[0].parent / "comparison.html"
    typer.echo(f"report: {write_comparison(runs, page)}")


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the data and the run folder.")] = Path(
        "runs"
    ),
    overrides: Overrides = None,
) -> None:
    """Run the whole pipeline on synthetic data: data, SFT, RL with vLLM rollouts, evaluation."""
    from cluster.cli import commands

    commands.quickstart(output, overrides or [])


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Benchmark to run, such as learner.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write the results to.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a smaller version of the benchmark.")
    ] = False,
) -> None:
    """Run one of the published benchmarks, from the root of the repository."""
    folders = ("quality", "speed")
    files = [p for folder in folders for p in (Path("benchmarks") / folder).glob("[!_]*.py")]
    modules = {p.stem: f"benchmarks.{p.parent.name}.{p.stem}" for p in files}
    if name not in modules:
        raise ConfigError(
            f"there is no bench {name!r}; choose from {', '.join(sorted(modules)) or 'none'} "
            "(benches run from the repository's root)",
            code="config.unknown_name",
        )
    sys.path.insert(0, str(Path.cwd()))  # an installed package does not contain the benchmarks
    result = importlib.import_module(modules[name]).run(quick=quick)
    text = json.dumps(result, indent=2)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(text + "\n")
    typer.echo(text)


def with_home(argument: str) -> str:
    """Replace a `~` that the shell left alone: at the start of an argument, or of `--option=`."""
    option, equals, value = argument.partition("=")
    if argument.startswith("~"):
        return os.path.expanduser(argument)
    is_option = bool(equals) and option.startswith("--") and value.startswith("~")
    return f"{option}={os.path.expanduser(value)}" if is_option else argument


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 on success, 2 for an error that the user can fix."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        app(args=[with_home(argument) for argument in given], standalone_mode=False)
    except RunInterrupted as interruption:
        typer.echo(str(interruption), err=True)
        sys.exit(143)  # exit code that a shell reports for SIGTERM
    except OrchardError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        typer.echo(
            f"error: a file cannot be written: {os.strerror(error.errno)}; make room "
            "(docs/runbooks/disk-full.md), and a run resumes by the same command",
            err=True,
        )
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:  # command-line usage errors, which print themselves
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(2)
