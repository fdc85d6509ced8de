"""The policy folder: `Policy.open` is its only reader, `Policy.save` its only writer.

model.safetensors, config.json      the Hugging Face model
value_head.safetensors              the value head, where there is one
adapter/lora.safetensors            factors of what LoRA added to the run's base, where it did
tokenizer.json, ...                 tokens and the prompt template
catalogue/                          the items and their codes
sids/                               the tokenizer bundle of the items (`orchard.semantic_ids`)
guide/                              the guide of its searches, where there is one (`orchard.guide`)
policy.json                         version, catalog digest, length of histories, measurements
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import CheckpointError
from orchard.folders import atomic_dir, atomic_write, check_readable
from orchard.guide.guide import ABOUT, Guide
from orchard.policy import item_tokenizer, model, value_head
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.weights import Weights, digest, snapshot, views
from orchard.semantic_ids import bundle as bundles
from orchard.semantic_ids.bundle import BUNDLE, Bundle
from orchard.types import PolicyVersion

FILE = "policy.json"
CATALOG, GUIDE = "catalogue", "guide"
ADAPTER = "adapter/lora.safetensors"


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """Content of `policy.json`; every field is empty for a folder that Orchard did not write."""

    version: PolicyVersion = field(default=PolicyVersion(step=0, digest=""))
    """Step, and digest of the weights."""
    catalog: str = ""
    """Digest of the catalog that the policy was trained on."""
    max_history: int | None = None
    """Items of a history that the policy reads."""
    measurements: Mapping[str, float] = field(default_factory=dict[str, float])
    """Measurements of the policy, such as its validation score."""
    adapter: str = ""
    """Digest of the LoRA factors beside the merged weights; empty where there are none."""
    data: Mapping[str, str] = field(default_factory=dict[str, str])
    """Digests of the data that it was made from: `train` and `valid`, the rows it was taught and
    selected by, and `items`."""
    bundle: str = ""
    """Digest of the tokenizer bundle; empty where the folder holds none."""

    @classmethod
    def read(cls, folder: Path) -> "PolicyFacts":
        """Read the facts of a policy folder.

        Raises:
            CheckpointError: `policy.json` cannot be read.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()
        try:
            tree: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(
                f"{path} is damaged: {error}; export the policy again", code="policy.damaged"
            ) from error
        version = tree.get("version", {})
        return cls(
            version=PolicyVersion(step=version.get("step", 0), digest=version.get("digest", "")),
            catalog=tree.get("catalogue", ""),
            max_history=tree.get("max_history"),
            measurements=tree.get("facts", {}),
            adapter=tree.get("adapter", ""),
            data=tree.get("data", {}),
            bundle=tree.get("bundle", ""),
        )

    def to_json(self) -> str:
        """Return the text of `policy.json`."""
        tree = {
            "version": {"step": self.version.step, "digest": self.version.digest},
            "catalogue": self.catalog,
            "max_history": self.max_history,
            "facts": dict(self.measurements),
            **({"adapter": self.adapter} if self.adapter else {}),
            **({"data": dict(self.data)} if self.data else {}),
            **({"bundle": self.bundle} if self.bundle else {}),
        }
        return json.dumps(tree, indent=2) + "\n"

    def check_catalog(self, catalog: Catalog, folder: Path) -> None:
        """Raise CheckpointError where the policy was trained on another catalog."""
        if self.catalog and self.catalog != catalog.digest:
            raise CheckpointError(
                f"the policy in {folder} was trained on catalog {self.catalog[:12]}, the one in "
                f"use is {catalog.digest[:12]}; use the items file that it was trained on, or run "
                "SFT on the new one",
                code="catalog.mismatch",
            )


def open_tokenizer(folder: Path, catalog: Catalog | None = None) -> ItemTokenizer:
    """Read tokens and catalog of a policy folder, without its weights.

    A given `catalog` takes the place of the folder's own.

    Raises:
        DataError: the folder holds no tokenizer, or no catalog where none is given.
        CatalogError: the tokenizer lacks a code of the catalog.
    """
    text_tokenizer = item_tokenizer.read_tokenizer(folder)
    catalog = _catalog_of(folder) if catalog is None else catalog
    return item_tokenizer.make_item_tokenizer(text_tokenizer, catalog)


def _catalog_of(folder: Path) -> Catalog:
    return catalogs.load(folder / CATALOG)


def read_adapter(folder: Path) -> Weights:
    """Read the LoRA factors beside a merged policy; empty where it has none.

    Raises:
        CheckpointError: the file is damaged, or is not the one that the folder names.
    """
    path, named = folder / ADAPTER, PolicyFacts.read(folder).adapter
    if not named:
        return {}
    check_readable(path)
    try:
        adapter = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; save the policy again") from error
    if digest(adapter) != named:
        raise CheckpointError(
            f"{path} has digest {digest(adapter)[:8]}, its folder names {named[:8]}; save the "
            "policy again"
        )
    return adapter


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """A model with its tokens, its catalog and its version."""

    version: PolicyVersion
    model: PreTrainedModel
    tokenizer: ItemTokenizer
    text_tokenizer: PreTrainedTokenizerBase
    facts: PolicyFacts = field(default_factory=PolicyFacts)
    """Facts of the folder that the policy was read from."""
    adapter: Weights = field(default_factory=dict[str, np.ndarray])
    """LoRA factors to save beside the merged weights; `read_adapter` reads them."""
    folder: Path | None = None
    """Folder that the policy was read from, which may hold a guide and a tokenizer bundle."""
    new_bundle: Bundle | None = None
    """Tokenizer bundle to save with it instead of the folder's own."""

    @classmethod
    def open(cls, folder: Path, tokenizer: ItemTokenizer | None = None) -> "Policy":
        """Read a policy folder; the version carries the digest of the weights as read.

        Args:
            folder: a policy folder.
            tokenizer: tokens and catalog that are in memory already; by default the folder's own.

        Raises:
            DataError: the folder holds no policy, or no catalog where none is given.
            CheckpointError: weights or `policy.json` are damaged, or belong to another catalog; or
                the weights do not have the digest that the folder names.
        """
        model.check_folder(folder)
        facts, text_tokenizer = PolicyFacts.read(folder), item_tokenizer.read_tokenizer(folder)
        if tokenizer is None:
            tokenizer = item_tokenizer.make_item_tokenizer(text_tokenizer, _catalog_of(folder))
        facts.check_catalog(tokenizer.catalog, folder)
        network = model.load(folder, tokenizer)
        found, named = digest(views(network)), facts.version.digest
        if named and named != found:
            raise CheckpointError(
                f"the weights have digest {found[:8]}, their folder names {named[:8]}; it is being "
                "written, or was damaged"
            )
        return cls(
            version=PolicyVersion(step=facts.version.step, digest=found),
            model=network,
            tokenizer=tokenizer,
            text_tokenizer=text_tokenizer,
            facts=facts,
            folder=folder,
        )

    @cached_property
    def weights(self) -> Weights:
        """Every parameter by name, in float32, in memory of its own."""
        return snapshot(self.model)

    @cached_property
    def guide(self) -> Guide | None:
        """Guide of the policy's folder, read on first use; None where there is none.

        Raises:
            CatalogError: the guide was fitted for another catalog.
            CheckpointError: a file of the guide is damaged.
        """
        return open_guide(self.folder, self.tokenizer.catalog) if self.folder else None

    @cached_property
    def bundle(self) -> Bundle | None:
        """Tokenizer bundle of the policy's items, read on first use; None where there is none.

        Raises:
            CatalogError: the bundle is of another catalog.
            CheckpointError: it is not the one that the folder names.
            DataError: a file of it is missing or damaged.
        """
        if self.new_bundle is not None or self.folder is None:
            return self.new_bundle
        return open_bundle(self.folder, self.tokenizer.catalog)

    def save(self, folder: Path, extra: Callable[[Path], None] | None = None) -> None:
        """Write the folder as a whole; a reader never meets half a policy.

        `extra` may write more files into the folder before it takes the place of an older one.
        """
        with atomic_dir(folder) as partial:
            value_head.save(self.model, partial)
            self.save_description(partial)
            if self.adapter:
                (partial / ADAPTER).parent.mkdir()
                (partial / ADAPTER).write_bytes(serialize(dict(self.adapter)))
            if extra is not None:
                extra(partial)

    def save_description(self, folder: Path) -> None:
        """Write everything but the weights into an existing folder."""
        self.text_tokenizer.save_pretrained(folder)
        catalogs.write(self.tokenizer.catalog, folder / CATALOG)
        facts = PolicyFacts(
            version=self.version,
            catalog=self.tokenizer.catalog.digest,
            max_history=self.facts.max_history,
            measurements=self.facts.measurements,
            adapter=digest(self.adapter) if self.adapter else "",
            data=self.facts.data,
            bundle=self.bundle.digest if self.bundle else "",
        )
        if self.bundle is not None:
            self.bundle.copy(folder / BUNDLE)
        atomic_write(folder / FILE, facts.to_json())
        if self.guide is not None:
            self.guide.save(folder / GUIDE)


def open_bundle(folder: Path, catalog: Catalog) -> Bundle | None:
    """Read the tokenizer bundle of a policy folder and verify it; None where there is none.

    Raises:
        CatalogError: the bundle is of another catalog.
        CheckpointError: it is not the one that the folder names.
        DataError: a file of it is missing or damaged.
    """
    named = PolicyFacts.read(folder).bundle
    if not named and not bundles.versions(folder / BUNDLE):
        return None
    bundle = Bundle.open(folder / BUNDLE)
    if named and bundle.digest != named:
        raise CheckpointError(
            f"the tokenizer bundle {folder / BUNDLE} has digest {bundle.digest[:12]}, its policy "
            f"was saved with {named[:12]}; save or export the policy again",
            code="policy.other_bundle",
        )
    bundle.check_catalog(
        catalog, remedy="give the bundle of these items, or save or export the policy again"
    )
    return bundle


def open_guide(folder: Path, catalog: Catalog) -> Guide | None:
    """Read the guide of a policy folder; None where there is none.

    Raises:
        CatalogError: the guide was fitted for another catalog.
        CheckpointError: a file of the guide is damaged.
    """
    if not has_guide(folder):
        return None
    return Guide.open(folder / GUIDE, catalog)


def has_guide(folder: Path) -> bool:
    """Return whether a policy folder holds a guide."""
    return (folder / GUIDE / ABOUT).is_file()
