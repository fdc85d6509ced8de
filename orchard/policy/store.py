"""What a policy folder says of the policy in it: version, catalog, facts."""

import json
from pathlib import Path
from typing import Any

from orchard.catalog.catalog import Catalog
from orchard.errors import CheckpointError

FILE = "policy.json"


def check_policy(folder: Path, items: Catalog) -> None:
    """Refuse a saved policy of another catalog; raises CheckpointError."""
    made_for = read_metadata(folder).get("catalogue", items.digest)
    if made_for != items.digest:
        raise CheckpointError(
            f"the policy in {folder} was trained on catalog {made_for[:12]}, the run has "
            f"{items.digest[:12]}; use the items file that it was trained on, or warm-start anew"
        )


def exported_step(folder: Path) -> int:
    """Step of the policy in a folder; 0 for one that Orchard did not export."""
    return read_metadata(folder).get("version", {}).get("step", 0)


def read_facts(folder: Path) -> dict[str, float]:
    """What `export` wrote of its policy; empty where there is none."""
    return read_metadata(folder).get("facts", {})


def read_metadata(folder: Path) -> dict[str, Any]:
    """What `export` wrote beside a policy; empty for one that Orchard did not export.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; export the policy again") from error
