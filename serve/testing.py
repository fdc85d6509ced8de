"""Test fixtures: a tiny policy, its catalog with attributes, and a torch engine."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchard.guide.guide import Guide
from orchard.policy.item_tokenizer import compact_tokenizer
from orchard.policy.store import GUIDE, Policy, PolicyFacts
from orchard.settings import FilterConfig
from orchard.testing import TinySetup, tiny_text_tokenizer
from orchard.types import PolicyVersion
from rollout.engine.torch import TorchEngine
from serve.catalog.attributes import Attributes
from serve.catalog.store import CatalogStore
from serve.decoding.recommender import BatchKey, Query

FILTERS = {
    "cheap": FilterConfig(column="price", op="<", value=5),
    "red": FilterConfig(column="colour", op="==", value="red"),
    "stocked": FilterConfig(column="stock", op="==", value=True),
}


@dataclass(frozen=True, kw_only=True)
class TinyShop:
    """Tiny setup with the engine and catalog store that serve it."""

    world: TinySetup
    engine: TorchEngine
    catalog_store: CatalogStore


def attributes_of(num_items: int) -> Attributes:
    """Create random attributes; price and color are missing for some items."""
    draw, ids = np.random.default_rng(5), np.arange(num_items)
    is_known = draw.random(num_items) < 0.9
    return Attributes(
        item_id=ids,
        column={
            "price": (draw.integers(0, 10, num_items), is_known),
            "colour": (np.array(["red", "blue"])[draw.integers(0, 2, num_items)], is_known),
            "stock": (draw.random(num_items) < 0.8, np.ones(num_items, bool)),
        },
    )


def make_catalog_store(world: TinySetup, keep: int = 3) -> CatalogStore:
    """Create a catalog store for the catalog of a tiny setup."""
    return CatalogStore(
        world.tokenizer,
        attributes=attributes_of(len(world.catalog)),
        filters=FILTERS,
        popularity={3: 9.0, 1: 7.0, 4: 7.0},
        keep=keep,
    )


def query(history: list[int], **changes: object) -> Query:
    """Create a query for ten items, with changes."""
    defaults: dict[str, object] = {
        "history": np.array(history, np.int64), "k": 10, "exclude": np.zeros(0, np.int64),
        "per_prefix": None, "seed": 0, "levels": False,
    }  # fmt: skip
    return Query(**(defaults | changes))  # pyright: ignore[reportArgumentType]


def kind(**changes: object) -> BatchKey:
    """Create the batch key of a beam wider than the catalog, with changes."""
    defaults: dict[str, object] = {"decoder": "beam", "width": 50, "filters": ()}
    return BatchKey(**(defaults | changes))  # pyright: ignore[reportArgumentType]


def export_policy(
    world: TinySetup,
    folder: Path,
    *,
    step: int,
    digest: str | None = None,
    guide: Guide | None = None,
) -> Path:
    """Write a policy folder as training exports it; `digest` replaces the digest of the weights."""
    version = PolicyVersion(step=step, digest=digest or world.version.digest)
    facts = PolicyFacts(max_history=10)
    make = tiny_text_tokenizer if world.tokenizer.think else compact_tokenizer
    Policy(
        version=version, model=world.model, tokenizer=world.tokenizer,
        text_tokenizer=make(world.catalog), facts=facts,
    ).save(folder)  # fmt: skip
    if guide is not None:
        guide.save(folder / GUIDE)
    return folder
