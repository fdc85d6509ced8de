"""Arguments and options shared by several commands."""

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(help="Run file (TOML); examples are in cluster/runs.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to override, such as learner.lr=1e-4.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Resolve and check the configuration, then exit.")
]
