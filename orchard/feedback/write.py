"""Write feedback folders."""

import json
from dataclasses import asdict
from pathlib import Path

from orchard.feedback.join import Joined, JoinOptions
from orchard.feedback.schema import ROWS, SUMMARY
from orchard.folders import atomic_dir, check_output_dir


def write_feedback(
    out: Path, joined: Joined, options: JoinOptions, *, overwrite: bool = False
) -> None:
    """Write the rows, and a summary of the counts and of the options that they were made with.

    Raises:
        DataError: `out` exists, and is no feedback or may not be overwritten.
    """
    check_output_dir(out, mark=ROWS, kind="feedback folder", overwrite=overwrite)
    with atomic_dir(out) as partial:
        joined.rows.write_parquet(partial / ROWS)
        summary = {"counts": joined.summary, "options": asdict(options)}
        (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
