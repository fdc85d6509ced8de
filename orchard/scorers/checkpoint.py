"""Small models that rewards and searches ask.

Each is a folder of `model.safetensors` and `model.json`. The JSON file comes last, so that a folder
that has one is whole. It says what the model is, for which catalog, of what sizes, and what was
measured when it was fitted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, CheckpointError, ConfigError
from orchard.folders import atomic_write

WEIGHTS, ABOUT = "model.safetensors", "model.json"


def save(
    model: nn.Module,
    folder: Path,
    *,
    kind: str,
    catalog: Catalog,
    sizes: Mapping[str, int],
    facts: Mapping[str, float],
) -> None:
    """Write a fitted model of a kind, made for a catalog; replaces what the folder held."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    about = {
        "kind": kind,
        "catalogue": catalog.digest,
        "sizes": dict(sizes),
        "facts": dict(facts),
    }
    atomic_write(folder / ABOUT, json.dumps(about, indent=2) + "\n")


def sizes(
    folder: Path, *, kind: str, catalog: Catalog, section: str = "rewards."
) -> dict[str, int]:
    """The sizes of a fitted model, whose settings are `section` and then its kind.

    Raises:
        ConfigError: there is none.
        CheckpointError: it is of another kind, or its description is damaged.
        CatalogError: it was fitted for another catalog.
    """
    setting = f"{section}{kind}"
    if not (folder / ABOUT).is_file():
        raise ConfigError(
            f"{setting} asks a fitted model, and {folder} holds none; run `orchard fit {kind}` "
            f"with the run file, or set {setting}.path"
        )
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        found, digest, known = about["kind"], about["catalogue"], about["sizes"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / ABOUT} is no description of a fitted model ({error}); fit it again"
        ) from error
    if found != kind:
        raise CheckpointError(f"{folder} holds a model for {found}, not {kind}; set {setting}.path")
    if digest != catalog.digest:
        raise CatalogError(
            f"the model of {setting} in {folder} was fitted on catalog {digest[:12]}, "
            f"the run has {catalog.digest[:12]}; run `orchard fit {kind}` for these items"
        )
    return known


def restore(model: nn.Module, folder: Path) -> None:
    """Load the weights in place; raises CheckpointError where they are damaged or do not fit."""
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not hold the model that {ABOUT} describes "
            f"({error}); fit it again"
        ) from error
    model.eval()
