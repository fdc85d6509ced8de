"""Save and load the checkpoints of scorers.

A checkpoint is a folder with `model.safetensors` and `model.json`. The JSON file is written last,
so a folder that has one is complete. It has the kind of the model, the digest of its catalog, its
sizes, and the metrics measured when it was fitted.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, CheckpointError, ConfigError
from orchard.folders import atomic_write, check_readable

M = TypeVar("M", bound=nn.Module)
WEIGHTS, ABOUT = "model.safetensors", "model.json"


def save(
    model: nn.Module,
    folder: Path,
    *,
    kind: str,
    catalog: Catalog,
    sizes: Mapping[str, int],
    facts: Mapping[str, float],
    data: Mapping[str, str] | None = None,
) -> None:
    """Write a fitted model of a kind for a catalog, replacing a checkpoint in the folder.

    `data` names the digests of the splits that it was fitted on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(serialize(tensors))
    description = {
        "kind": kind,
        "catalogue": catalog.digest,
        "sizes": dict(sizes),
        "facts": dict(facts),
        "data": dict(data or {}),
    }
    atomic_write(folder / ABOUT, json.dumps(description, indent=2) + "\n")


def _sizes(folder: Path, *, kind: str, catalog: Catalog, section: str) -> dict[str, int]:
    """Read the sizes of a fitted model, whose settings are under `section` and its kind."""
    setting = f"{section}{kind}"
    if not (folder / ABOUT).is_file():
        raise ConfigError(
            f"{setting} needs a fitted model, and {folder} holds none; run `orchard fit {kind}` "
            f"with the run file, or set {setting}.path"
        )
    try:
        description: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        model_kind, digest, model_sizes = (
            description["kind"],
            description["catalogue"],
            description["sizes"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / ABOUT} does not describe a fitted model ({error}); fit it again"
        ) from error
    if model_kind != kind:
        raise CheckpointError(
            f"{folder} holds a model for {model_kind}, not {kind}; set {setting}.path"
        )
    if digest != catalog.digest:
        raise CatalogError(
            f"the model of {setting} in {folder} was fitted on catalog {digest[:12]}, "
            f"the run has {catalog.digest[:12]}; run `orchard fit {kind}` for these items"
        )
    return model_sizes


def load(
    make: Callable[..., M], folder: Path, *, kind: str, catalog: Catalog, section: str = "rewards."
) -> M:
    """Load the model that `orchard fit` wrote to a folder; `make` creates it from its sizes.

    Raises:
        DataError: its file may not be read.
        ConfigError: the folder has no model.
        CatalogError: the model was fitted for another catalog.
        CheckpointError: the model is of another kind, or damaged.
    """
    model = make(**_sizes(folder, kind=kind, catalog=catalog, section=section))
    check_readable(folder / WEIGHTS)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not hold the model that {ABOUT} describes "
            f"({error}); fit it again"
        ) from error
    return model.eval()
