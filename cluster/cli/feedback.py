"""Join an exposure log with events, for `orchard data feedback`."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from orchard.catalog import catalog as catalogs
from orchard.errors import ConfigError
from orchard.feedback.join import JoinOptions, join
from orchard.feedback.read import read_events, read_exposures
from orchard.feedback.schema import ROWS
from orchard.feedback.write import write_feedback
from orchard.folders import check_output_dir


def make_feedback(
    log: Path,
    events: Path,
    out: Path,
    options: JoinOptions,
    *,
    items: Path | None,
    overwrite: bool,
) -> None:
    """Join a log with events, write the feedback to `out`, and print what became of every row.

    Raises:
        ConfigError, DataError: one sentence each; see `orchard.feedback`.
    """
    check_output_dir(out, mark=ROWS, kind="feedback folder", overwrite=overwrite)
    catalog = None if items is None else catalogs.read(items)
    joined = join(read_exposures(log), read_events(events), options, catalog)
    write_feedback(out, joined, options, overwrite=overwrite)
    for name, value in joined.summary.items():
        typer.echo(f"{name:>18}  {value:g}")
    for warning in joined.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"feedback: {out}")


def behavior_values(pairs: Sequence[str]) -> dict[str, float]:
    """Return the value of each behavior, from texts such as `buy=1`.

    Raises:
        ConfigError: a text has another form.
    """
    values: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError:
            name = ""
        if not name.strip():
            raise ConfigError(f"--value = {pair!r} is not a behavior with a number, such as buy=1")
    return values


def join_options(**options: Any) -> JoinOptions:
    """Return the options of a join, with the names of choices checked.

    Raises:
        ConfigError: an option names no known choice or is out of bounds.
    """
    kinds = get_type_hints(JoinOptions)
    for each in fields(JoinOptions):
        choices, value = get_args(kinds[each.name]), options[each.name]
        if isinstance(value, str) and value not in choices:
            option = each.name.replace("_", "-")
            raise ConfigError(f"--{option} = {value!r}; choose {' or '.join(choices)}")
    return JoinOptions(**options)
