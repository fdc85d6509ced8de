"""Read policies to serve: weights, digests and guides of a policy folder, and archived copies."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from orchard.catalog.catalog import Catalog
from orchard.errors import CheckpointError, DataError, OrchardError
from orchard.guide.events import NONE, Events, with_events
from orchard.guide.guide import Guide
from orchard.guide.remap import on_catalog
from orchard.policy import model as models
from orchard.policy import value_head
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import FILE, GUIDE, Policy
from orchard.policy.weights import Weights
from orchard.types import PolicyVersion

_ARCHIVED = re.compile(r"[0-9]+-[0-9a-f]*")
"""Name of an archived policy: step, and the first digits of the digest."""
UNREADABLE = (OSError, OrchardError, ValueError, KeyError)
"""Errors of a folder that is half written, damaged, or of another catalog."""


class CarriedGuide:
    """Guide of a policy, carried to the catalog that is served, with the events since its fit."""

    def __init__(self, guide: Guide) -> None:
        """Start on the catalog that the guide was fitted for."""
        self.own = guide
        self._last = (guide.catalog.digest, 0), guide

    def on(self, catalog: Catalog, events: Events = NONE) -> Guide:
        """Return the guide for a catalog and events, remembered until others are asked for."""
        key, last = self._last
        if key != (catalog.digest, events.version):
            last = with_events(on_catalog(self.own, catalog), events)
            _ = last.static  # computed here, not in the first search
            self._last = (catalog.digest, events.version), last
        return last


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPolicy:
    """Policy read from a folder, with a verified digest."""

    version: PolicyVersion
    weights: Weights
    model: models.PreTrainedModel
    has_values: bool
    """Whether the policy has a value head."""
    stamp: str
    """Stamp of the folder when reading started; see `folder_stamp`."""
    source: Path
    """Folder that it was read from, symbolic links resolved."""
    guide: CarriedGuide | None = None
    """Guide of its searches; None if its folder has none, or none is to be used."""
    guide_notes: tuple[str, ...] = ()
    """Reasons why the guide is not used, or was fitted for something else."""

    @property
    def guide_digest(self) -> str:
        """Digest of the guide, empty without one."""
        return "" if self.guide is None else self.guide.own.digest


def read_policy(folder: Path, tokenizer: ItemTokenizer, *, with_guide: bool = True) -> LoadedPolicy:
    """Load and verify the policy of a folder, with its guide unless none is to be used.

    A guide that cannot be used does not keep the policy from being served.

    Raises:
        DataError: the folder contains no policy.
        CheckpointError: the weights do not match the digest in the folder, or belong to another
            catalog than the tokenizer's.
    """
    stamp, source = folder_stamp(folder), folder.resolve()
    # Read through one resolved path: a link that is switched meanwhile cannot mix two policies.
    policy = Policy.open(source, tokenizer)
    guide, notes = guide_of(policy) if with_guide else (None, ())
    return LoadedPolicy(
        version=policy.version, weights=policy.weights, model=policy.model,
        has_values=value_head.value_head_of(policy.model) is not None, stamp=stamp, source=source,
        guide=guide, guide_notes=notes,
    )  # fmt: skip


def guide_of(policy: Policy) -> tuple[CarriedGuide | None, tuple[str, ...]]:
    """Return the guide of a policy's folder, and what is to be said of it."""
    try:
        guide = policy.guide
    except (OSError, OrchardError) as error:
        why = "it cannot be read" if isinstance(error, OSError) else without_paths(error)
        return None, (f"the guide is not used: {why}",)
    if guide is None:
        return None, ()
    notes = guide.notes(train=policy.facts.data.get("train", ""), policy=policy.version.digest)
    return CarriedGuide(guide), tuple(notes)


def read_copy(copy: Path, tokenizer: ItemTokenizer, *, with_guide: bool = True) -> LoadedPolicy:
    """Load an archived policy; raise CheckpointError if it is not the version that its name says.

    Its stamp is empty: whatever is in the policy's folder counts as new.
    """
    loaded = read_policy(copy, tokenizer, with_guide=with_guide)
    if str(loaded.version) != copy.name:
        raise CheckpointError(f"{copy} holds policy {loaded.version}; remove the folder")
    return replace(loaded, stamp="")


def folder_stamp(folder: Path) -> str:
    """Return a string that changes with every change of the folder's files; empty without any.

    A change in place counts as well: size and times of every file are part of the stamp, and so is
    the folder that a symbolic link leads to.
    """
    try:
        source = folder.resolve(strict=True)
        parts = [str(source)]
        inside = (source / GUIDE).iterdir() if (source / GUIDE).is_dir() else ()
        for path in sorted([*source.iterdir(), *inside]):
            if path.name.startswith(".") or not path.is_file():
                continue
            status = path.stat()
            parts.append(
                f"{path.relative_to(source)}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
            )
        if len(parts) == 1:
            return ""
        facts = source / FILE
        if facts.is_file():
            parts.append(facts.read_text())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return ""


def archived_policies(archive: Path) -> list[Path]:
    """Return the folders of archived policies, oldest first."""

    def found() -> Iterator[Path]:
        for path in archive.iterdir() if archive.is_dir() else ():
            if _ARCHIVED.fullmatch(path.name):
                yield path

    return sorted(found(), key=lambda path: int(path.name.split("-")[0]))


def sentence(error: Exception) -> str:
    """Return an error message without file paths, safe to show to clients."""
    if isinstance(error, OSError | ValueError | KeyError | DataError):
        return "the policy folder could not be read"
    return without_paths(error)


def without_paths(error: Exception) -> str:
    """Return an error message with file paths left out."""
    return re.sub(r"\S*/\S+", "its folder", str(error))
