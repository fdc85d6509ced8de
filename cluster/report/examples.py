"""Read the search examples of a run folder; needs neither Ray nor torch.

`cluster.training.search_examples` writes them and describes the format.
"""

import json
from pathlib import Path
from typing import Any

FILE = "examples.json"
"""Name of the file in the run folder."""


def read_examples(run_dir: Path) -> list[dict[str, Any]]:
    """Return the examples of a run, empty without a file; raises ValueError on a damaged one."""
    path = run_dir / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
