"""Policy slot: hot reload, verification, pinning and rollback of one served policy.

    folder -> load (digest, catalog) -> reference of a probe -> install -> probe again -> answer

Loading runs concurrently with the searches. The switch happens between two searches, in the search
thread, so that no answer mixes policies. If the engine then scores the probe differently from an
independent copy of the model, the previous weights are restored before any request is answered.
"""

import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import CheckpointError, EngineError
from orchard.guide.events import NONE, Events
from orchard.guide.guide import Guide, named_digest
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import CATALOG, GUIDE
from orchard.semantic_ids.bundle import BUNDLE
from orchard.types import PolicyVersion, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import InferenceEngine
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from serve.errors import UnknownNameError
from serve.policies.read import (
    UNREADABLE,
    LoadedPolicy,
    archived_policies,
    folder_stamp,
    read_copy,
    read_policy,
    sentence,
)
from serve.schema import Decoder

_log = logging.getLogger("orchard.serve")
LATEST = "latest"
_PROBES, _PROBE_WIDTH = 4, 8
_SHARED = shutil.ignore_patterns(CATALOG, BUNDLE)
"""Folders of a policy that all archived copies share (see `serve.shared_state`)."""
_REREAD_S = 10.0
"""Seconds until an unchanged folder that could not be read is read again."""


def probe(engine: InferenceEngine, tokenizer: ItemTokenizer) -> Candidates:
    """Search the probe, a few fixed histories, with a policy's engine."""
    # Evenly spaced catalog rows, three per history.
    rows = np.linspace(0, len(tokenizer.catalog) - 1, 3 * _PROBES).astype(np.int64)
    start = ragged.starts(np.full(_PROBES, 3))
    token, token_start = tokenizer.encode_history(rows, start)
    prompts = Prompts(
        id=np.arange(_PROBES), target=np.zeros(_PROBES, np.int64), history=rows,
        history_start=start, token=token, token_start=token_start,
    )  # fmt: skip
    return engine.run(partial(beam, width=_PROBE_WIDTH), prompts)


class PolicySlot:
    """One variant: its inference engine and the folder that it follows.

    `read_new_policy` and `load_archived` may run in any thread, one at a time; `switch` and
    `set_catalog` must run in the search thread.
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
        with_guide: bool = True,
        share: float = 0.0,
        shadow: bool = False,
        spared: str | None = None,
        refused: str = "",
    ) -> None:
        """Create the engine of the first policy with `make` and archive that policy.

        Args:
            name: name of the variant.
            folder: folder that training exports new policies to.
            first: policy in the folder now.
            tokenizer: item tokenizer of all policies of the slot, with their training catalog.
            make: creates an engine for a policy.
            keep: folder for archived policies.
            versions: maximum number of archived policies.
            tolerance: largest score difference between engine and reference on the probe.
            with_guide: whether guides of policies are used.
            share: share of the users.
            shadow: whether answers are only logged.
            spared: archived version that is never deleted, because replicas pin it.
            refused: why `first` is not the policy in the folder, if it is not.
        """
        self.name, self.share, self.shadow = name, share, shadow
        self.pinned: str | None = None
        self.refused = refused
        self.events = NONE
        """Events since the guide was fitted; the next search counts them."""
        self.inference_engine = make(first)
        self._folder, self._tokenizer, self._with_guide = folder, tokenizer, with_guide
        self._digest = tokenizer.catalog.digest
        self._accept(first, tokenizer.catalog)
        self._keep, self._versions, self._tolerance = keep / name, versions, tolerance
        self._spared = spared
        self._seen = first.stamp  # an export after this one is new
        self._unreadable, self._reread_at = "", 0.0
        self.archive(first)

    @property
    def version(self) -> PolicyVersion:
        """Version of the policy that answers."""
        return self.inference_engine.version

    @property
    def engine(self) -> str:
        """Name of the inference engine, `torch` or `vllm`."""
        return "torch" if isinstance(self.inference_engine, TorchEngine) else "vllm"

    @property
    def kept(self) -> list[str]:
        """Archived versions that can be activated, oldest first."""
        return [path.name for path in archived_policies(self._keep)]

    @property
    def decoders(self) -> list[Decoder]:
        """Decoders that requests may name; the last one is the default, if it is `guided`."""
        decoders: list[Decoder] = ["beam", "beam_sample"]
        if self._has_values and isinstance(self.inference_engine, TorchEngine):
            decoders.append("ved")
        return decoders if self.guide is None else [*decoders, "guided"]

    @property
    def guide_digest(self) -> str:
        """Digest of the guide as it was fitted, empty without one."""
        return "" if self._carried is None else self._carried.own.digest

    @property
    def guide_version(self) -> str:
        """Digest of the guide as it was fitted and version of the events; empty without a guide."""
        return "" if self._carried is None else f"{self.guide_digest} {self.events.version}"

    def prepare(self, catalog: Catalog, events: Events) -> None:
        """Carry the guide to a catalog and events that come next; may run in any thread."""
        if self._carried is not None:
            self._carried.on(catalog, events)

    def read_new_policy(self) -> LoadedPolicy | None:
        """Return a new policy from the folder, None if there is none or a version is pinned.

        A policy that cannot be read sets `refused`.
        """
        stamp = folder_stamp(self._folder)
        if self.pinned is not None or stamp == self._seen:
            return None
        if stamp == self._unreadable and time.monotonic() < self._reread_at:
            return None
        try:
            loaded = read_policy(self._folder, self._tokenizer, with_guide=self._with_guide)
        except UNREADABLE as error:
            # It may still be written: the next poll reads it again, or a later one if it stays.
            self._unreadable, self._reread_at = stamp, time.monotonic() + _REREAD_S
            self.refused = sentence(error)
            return None
        if folder_stamp(self._folder) != loaded.stamp:
            return None
        self._seen, self.refused = loaded.stamp, ""
        is_same = (loaded.version.step, loaded.version.digest) == (
            self.version.step,
            self.version.digest,
        )
        if is_same and loaded.guide is None and loaded.guide_notes:
            self.guide_notes = loaded.guide_notes  # the guide before it serves on
            return None
        return None if is_same and loaded.guide_digest == self.guide_digest else loaded

    def load_archived(self, version: str) -> LoadedPolicy:
        """Load an archived version and verify it again.

        Raises:
            UnknownNameError: the version is not archived, or is damaged.
        """
        if version not in self.kept:
            raise UnknownNameError(
                f"policy {version!r} is not kept; there are {', '.join(self.kept) or 'none'}"
            )
        damaged = f"policy {version} is kept but damaged; activate another of GET /v1/policy"
        try:
            return read_copy(self._keep / version, self._tokenizer, with_guide=self._with_guide)
        except UNREADABLE as error:
            raise UnknownNameError(damaged) from error

    def unpin(self) -> None:
        """Follow the folder again; its current policy counts as new."""
        self.pinned, self._spared, self._seen = None, None, ""

    def reference_scores(self, loaded: LoadedPolicy, catalog: Catalog) -> Candidates | None:
        """Score the probe with an independent copy of a policy's model.

        Safe to run concurrently with searches. Return None if the model cannot search, and set
        `refused` to the reason.
        """
        tokenizer = self._tokenizer.with_catalog(catalog)
        if loaded.guide is not None:
            loaded.guide.on(catalog, self.events)
        try:
            reference = TorchEngine(loaded.model, tokenizer, loaded.version)
            return probe(reference, tokenizer)
        except EngineError as error:
            self.refused = sentence(error)
            return None

    def switch(self, loaded: LoadedPolicy, catalog: Catalog, expected: Candidates) -> bool:
        """Switch to a policy if the engine reproduces the reference scores of the probe.

        Returns:
            Whether the switch succeeded; otherwise the previous policy stays active, and `refused`
            gives the reason.
        """
        tokenizer = self._tokenizer.with_catalog(catalog)
        old_version, old_weights = self.version, self._weights
        try:
            self.set_catalog(catalog)
            self.inference_engine.load_weights(loaded.version, loaded.weights)
            candidates = probe(self.inference_engine, tokenizer)
            check_probe(candidates, expected, loaded.version, self._tolerance)
        except (EngineError, CheckpointError) as error:
            if self.version is not old_version:
                self.inference_engine.load_weights(old_version, old_weights)
            self.refused = sentence(error)
            return False
        self._accept(loaded, catalog)
        self.refused = ""
        return True

    def set_catalog(self, catalog: Catalog) -> None:
        """Switch the engine to a catalog, and the guide to it and to the current events."""
        if self._digest != catalog.digest:
            self.inference_engine.set_catalog(catalog)
            self._digest = catalog.digest
        # A look-up where nothing has changed, or what has was prepared.
        self.guide = self._carried.on(catalog, self.events) if self._carried else None

    def _accept(self, policy: LoadedPolicy, catalog: Catalog) -> None:
        """Take over what belongs to the policy whose weights the engine has."""
        self._weights, self._has_values = policy.weights, policy.has_values
        self._carried, self.guide_notes = policy.guide, policy.guide_notes
        self.guide: Guide | None = policy.guide.on(catalog, self.events) if policy.guide else None

    def archive(self, accepted: LoadedPolicy) -> None:
        """Archive an accepted policy if its export is unchanged; delete the oldest copies.

        A copy that is there already gets the guide of the policy if that is another one.
        """
        target, guide = self._keep / str(accepted.version), accepted.guide
        if target.is_dir() and guide and named_digest(target / GUIDE) != accepted.guide_digest:
            try:
                guide.own.save(target / GUIDE)
            except OSError as error:
                _log.info("the guide of %s is not archived: %s", accepted.version, error)
        if not target.is_dir():
            # Replicas share the archive: each writes its own copy, and the first rename wins.
            copy = target.with_name(f".{target.name}.{uuid4().hex}")
            try:
                shutil.copytree(accepted.source, copy, ignore=_SHARED)
                if folder_stamp(self._folder) == accepted.stamp:
                    copy.rename(target)
            except OSError as error:  # another replica was first, or training replaced the folder
                _log.info("policy %s is not archived: %s", accepted.version, error)
            finally:
                shutil.rmtree(copy, ignore_errors=True)
        for old in self.kept[: -self._versions]:
            used = (self.pinned, self._spared, str(self.version), str(accepted.version))
            if old not in used:
                shutil.rmtree(self._keep / old, ignore_errors=True)


def check_probe(
    candidates: Candidates, expected: Candidates, version: PolicyVersion, tolerance: float
) -> None:
    """Raise EngineError if the engine's probe scores differ from the reference by more than this.

    A different number of candidates counts as an infinite difference.
    """
    same_shape = np.array_equal(candidates.start, expected.start)
    gap = float("inf")
    if same_shape:
        gap = float(np.abs(candidates.score - expected.score).max(initial=0.0))
    if not gap <= tolerance:
        raise EngineError(
            f"the engine scores the probe {gap:.2g} away from policy {version}'s own model, more "
            f"than {tolerance:g}; the previous policy keeps serving"
        )
