"""A policy behind the endpoint, and its successors: found, verified, switched to, gone back from.

    folder -> load (digest, catalog) -> reference of a probe -> install -> probe again -> answer

Loading goes on beside the searches. The switch happens between two of them, in the thread that
searches, so that no answer mixes policies. Weights that the engine then scores otherwise than an
independent copy of the model are taken back before anyone is answered by them.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import CheckpointError, DataError, EngineError, OrchardError
from orchard.policy import model as models
from orchard.policy import value_head
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.weights import Weights, digest, snapshot
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import InferenceEngine
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from serve.errors import UnknownNameError

_log = logging.getLogger("orchard.serve")
LATEST = "latest"
_PROBES, _PROBE_WIDTH = 4, 8
_TRANSIENT = (OSError, OrchardError, ValueError, KeyError)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPolicy:
    """A policy that was read and whose digest holds."""

    version: PolicyVersion
    weights: Weights
    model: models.PreTrainedModel
    guided: bool
    """It has a value head."""
    stamp: str
    """Of the folder when the reading began."""


def read_policy(folder: Path, tokenizer: ItemTokenizer) -> LoadedPolicy:
    """The policy of a folder.

    Raises:
        DataError: the folder holds no policy.
        CheckpointError: the weights are not those that the folder names, or belong to another
            catalog than the tokenizer's.
    """
    stamp, about = folder_stamp(folder), read_facts(folder)
    catalog = tokenizer.catalog.digest
    if about is not None and about["catalogue"] != catalog:
        raise CheckpointError(
            f"the policy was trained on catalog {about['catalogue'][:12]}, the endpoint serves "
            f"{catalog[:12]}; serve it from its own folder"
        )
    model = models.load(folder, tokenizer)
    weights = snapshot(model)
    found = digest(weights)
    step = about["version"]["step"] if about is not None else 0
    named = about["version"]["digest"] if about is not None else ""
    if named and named != found:
        raise CheckpointError(
            f"the weights have digest {found[:8]}, their folder names {named[:8]}; it is being "
            "written, or was damaged"
        )
    return LoadedPolicy(
        version=PolicyVersion(step=step, digest=found), weights=weights, model=model,
        guided=value_head.value_head_of(model) is not None, stamp=stamp,
    )  # fmt: skip


def folder_stamp(folder: Path) -> str:
    """What changes when a policy is exported; empty while there is none."""
    try:
        facts = folder / "policy.json"
        at = facts.stat()
        return f"{at.st_ino}-{at.st_mtime_ns}-{facts.read_text()}"
    except OSError:
        return ""


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What an export says of its policy; None where the folder is not an export."""
    facts = folder / "policy.json"
    return json.loads(facts.read_text()) if facts.is_file() else None


def probe(holder: InferenceEngine, tokenizer: ItemTokenizer) -> Candidates:
    """What a policy makes of a few fixed histories."""
    rows = np.linspace(0, len(tokenizer.catalog) - 1, 3 * _PROBES).astype(np.int64)
    start = ragged.starts(np.full(_PROBES, 3))
    token, token_start = tokenizer.encode_history(rows, start)
    prompts = Prompts(
        id=np.arange(_PROBES), target=np.zeros(_PROBES, np.int64), history=rows,
        history_start=start, token=token, token_start=token_start,
    )  # fmt: skip
    return holder.run(partial(beam, width=_PROBE_WIDTH), prompts)


class PolicySlot:
    """One variant: the engine that answers, and the folder that it follows.

    `poll` and `load_archived` may run in any thread but one at a time; `switch` and `set_catalog`
    belong to the thread that searches.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        first: LoadedPolicy,
        tokenizer: ItemTokenizer,
        make: Callable[[LoadedPolicy], InferenceEngine],
        *,
        keep: Path,
        versions: int,
        tolerance: float,
        share: float = 0.0,
        shadow: bool = False,
    ) -> None:
        """Answer with the first policy, whose engine `make` makes.

        Args:
            name: of the variant.
            folder: where new policies are found.
            first: the policy there now.
            tokenizer: of all policies of the slot, with the catalog that they were trained on.
            make: an engine for a policy.
            keep: folder in which accepted policies are kept.
            versions: how many are.
            tolerance: between engine and reference on the probe.
            share: of the users.
            shadow: answers for the log alone.
        """
        self.name, self.share, self.shadow = name, share, shadow
        self.pinned: str | None = None
        self.refused = ""
        self.holder = make(first)
        self.guided = first.guided and isinstance(self.holder, TorchEngine)
        self._folder, self._tokenizer = folder, tokenizer
        self._digest = tokenizer.catalog.digest
        self._weights = first.weights
        self._keep, self._versions, self._tolerance = keep / name, versions, tolerance
        self._seen = first.stamp  # an export since then is a new one
        self.archive(first)

    @property
    def version(self) -> PolicyVersion:
        """The policy that answers."""
        return self.holder.version

    @property
    def engine(self) -> str:
        """What the policy runs in."""
        return "torch" if isinstance(self.holder, TorchEngine) else "vllm"

    @property
    def kept(self) -> list[str]:
        """Versions that can be activated, oldest first."""
        if not self._keep.is_dir():
            return []
        there = [p for p in self._keep.iterdir() if not p.name.startswith(".")]
        return [p.name for p in sorted(there, key=lambda p: int(p.name.split("-")[0]))]

    def poll(self) -> LoadedPolicy | None:
        """A new policy in the folder, unless a version is pinned; notes why it was refused."""
        if self.pinned is not None or folder_stamp(self._folder) == self._seen:
            return None
        try:
            loaded = read_policy(self._folder, self._tokenizer)
        except _TRANSIENT as error:
            # Half a policy may be there while training writes: it is looked at again.
            self.refused = _sentence(error)
            return None
        if folder_stamp(self._folder) != loaded.stamp:
            return None
        self._seen, self.refused = loaded.stamp, ""
        if (loaded.version.step, loaded.version.digest) == (
            self.version.step,
            self.version.digest,
        ):
            return None
        return loaded

    def load_archived(self, version: str) -> LoadedPolicy:
        """A kept version, verified anew.

        Raises:
            UnknownNameError: it is not kept, or is damaged.
        """
        if version not in self.kept:
            raise UnknownNameError(
                f"policy {version!r} is not kept; there are {', '.join(self.kept) or 'none'}"
            )
        damaged = f"policy {version} is kept but damaged; activate another of GET /v1/policy"
        try:
            loaded = read_policy(self._keep / version, self._tokenizer)
        except _TRANSIENT as error:
            raise UnknownNameError(damaged) from error
        if str(loaded.version) != version:
            raise UnknownNameError(damaged)
        return loaded

    def unpin(self) -> None:
        """Follow the folder again; what is there now counts as new."""
        self.pinned, self._seen = None, ""

    def reference_scores(self, loaded: LoadedPolicy, catalog: Catalog) -> Candidates | None:
        """What a policy's own model makes of the probe, beside the searches; None if it cannot.

        `refused` then says why.
        """
        tokenizer = self._tokenizer.with_catalog(catalog)
        reference = TorchEngine(loaded.model, tokenizer, loaded.version)
        try:
            return probe(reference, tokenizer)
        except EngineError as error:
            self.refused = _sentence(error)
            return None

    def switch(self, loaded: LoadedPolicy, catalog: Catalog, expected: Candidates) -> bool:
        """Answer with this policy, if its engine scores the probe as its own model does.

        Returns:
            If it does; otherwise the policy before it answers on, and `refused` says why.
        """
        tokenizer = self._tokenizer.with_catalog(catalog)
        before, weights = self.version, self._weights
        try:
            self.set_catalog(catalog)
            self.holder.load_weights(loaded.version, loaded.weights)
            found = probe(self.holder, tokenizer)
            check_probe(found, expected, loaded.version, self._tolerance)
        except (EngineError, CheckpointError) as error:
            if self.version is not before:
                self.holder.load_weights(before, weights)
            self.refused = _sentence(error)
            return False
        self._weights, self.refused = loaded.weights, ""
        self.guided = loaded.guided and isinstance(self.holder, TorchEngine)
        return True

    def set_catalog(self, catalog: Catalog) -> None:
        """Search this catalog from now on."""
        if self._digest != catalog.digest:
            self.holder.set_catalog(catalog)
            self._digest = catalog.digest

    def archive(self, accepted: LoadedPolicy) -> None:
        """Copy a policy that answers now, if it is still in the folder; drop the oldest copies."""
        target = self._keep / str(accepted.version)
        if not target.is_dir():
            # Replicas share the folder of copies: each makes one of its own, the first is kept.
            copy = target.with_name(f".{target.name}.{uuid4().hex}")
            try:
                shutil.copytree(self._folder, copy, ignore=shutil.ignore_patterns("catalogue"))
                if folder_stamp(self._folder) == accepted.stamp:
                    copy.rename(target)
            except OSError as error:  # another was first, or training swapped the folder meanwhile
                _log.info("policy %s is not kept: %s", accepted.version, error)
            finally:
                shutil.rmtree(copy, ignore_errors=True)
        for old in self.kept[: -self._versions]:
            if old not in (self.pinned, str(self.version), str(accepted.version)):
                shutil.rmtree(self._keep / old, ignore_errors=True)


def check_probe(
    found: Candidates, expected: Candidates, version: PolicyVersion, tolerance: float
) -> None:
    """Raise EngineError where an engine and its reference disagree on a probe."""
    same = np.array_equal(found.start, expected.start)
    gap = float(np.abs(found.score - expected.score).max(initial=0.0)) if same else float("inf")
    if not gap <= tolerance:
        raise EngineError(
            f"the engine scores the probe {gap:.2g} away from policy {version}'s own model, more "
            f"than {tolerance:g}; the policy before it answers on"
        )


def _sentence(error: Exception) -> str:
    """A reason without paths, which an endpoint may show."""
    if isinstance(error, OSError | ValueError | KeyError | DataError):
        return "the policy folder could not be read"
    return re.sub(r"\S*/\S+", "its folder", str(error))
