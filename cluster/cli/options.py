"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(help="Run file (TOML); see cluster/runs.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to it, such as learner.lr=1e-4.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Resolve and check everything, start nothing.")
]
