"""Orchard: reinforcement learning for generative recommendation.

    import orchard

    policy = orchard.load("runs/quickstart/policy")
    policy.recommend(history=[3, 17, 5], k=10, exclude_seen=True)
    policy.score(history=[3, 17, 5], items=[8, 21])
    policy.search_trees([[3, 17, 5]], width=8)
    orchard.read_metrics("runs/quickstart")
    orchard.read_evaluations("runs/quickstart")
    orchard.Client("http://127.0.0.1:8000").recommend([3, 17, 5], k=10)

Names are imported on first use: `import orchard` loads neither torch nor Ray.
"""

import importlib
from typing import Any

_MODULE_OF = {
    "AsyncClient": "serve.client",
    "Client": "serve.client",
    "load": "serve.local",
    "LocalPolicy": "serve.local",
    "read_metrics": "orchard.tables",
    "read_evaluations": "orchard.tables",
}
# Types are declared in `__init__.pyi`.


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'orchard' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """List public names for completion."""
    return sorted([*globals(), *_MODULE_OF])
