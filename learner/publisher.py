"""Publish versions of a policy: pack them, store them, and return where they are; free of Ray.

The parameters of a float32 policy on the CPU are not copied on their way into the object store, and
their digest is computed beside the copy that the store makes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from orchard.policy import lora, transfer
from orchard.policy.transfer import TransferFormat, WeightTransfer
from orchard.policy.weights import Weights
from orchard.types import StoredTransfer


@dataclass(frozen=True, kw_only=True)
class ObjectStore:
    """Functions of an object store."""

    put: Callable[[object], Any]
    """Copy a value into the store and return its reference."""
    get: Callable[[Any], Any]
    """Return a stored value, in the memory of the store."""


class Publisher:
    """Publisher of one phase of a run, on one rank."""

    def __init__(
        self, policy: PreTrainedModel, format: TransferFormat, store: ObjectStore, *, writes: bool
    ) -> None:
        """Prepare to publish versions of a policy, before its first update and unsharded.

        Args:
            policy: policy to train; its weights below the adapters are the base of its transfers.
            format: format of the versions to search with.
            store: object store.
            writes: whether this rank stores anything; the others only take part in gathering.
        """
        self._format, self._store, self._writes = format, store, writes
        self._trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        self._base_ref: Any = None
        self._base_digest = ""
        self._base: Weights = {}
        if format == "adapter" and writes:
            values, _ = lora.parts(policy)
            base = self._put(transfer.pack(values))
            self._base_ref, self._base_digest = base.ref, base.digest
            stored: WeightTransfer = store.get(base.ref)
            self._base = stored.tensors

    def publish(self, model: PreTrainedModel, *, exact: bool = False) -> StoredTransfer | None:
        """Store the weights of the policy, or of a copy of it; None on a rank that does not write.

        This is a collective operation if the parameters are sharded. With `exact`, float32 takes
        the place of a format that rounds.
        """
        if self._format == "adapter":
            trained, adapters = lora.parts(model, self._trained)
            if not self._writes:
                return None
            packed = transfer.pack_adapters(
                trained, adapters, base=self._base, digest=self._base_digest
            )
            return self._put(packed)
        weights = lora.merged(model)
        if not self._writes:
            return None
        return self._put(transfer.pack(weights, rounded=self.rounds and not exact))

    @property
    def rounds(self) -> bool:
        """Whether versions to search with are rounded."""
        return self._format == "bfloat16"

    def store(self, value: object) -> Any:
        """Store any other value and return its reference; None on a rank that does not write."""
        return self._store.put(value) if self._writes else None

    def _put(self, packed: WeightTransfer) -> StoredTransfer:
        """Store a transfer, and compute its digest meanwhile."""
        with ThreadPoolExecutor(1) as executor:
            digest = executor.submit(transfer.digest, packed, threads=torch.get_num_threads())
            ref = self._store.put(packed)
            return StoredTransfer(digest=digest.result(), ref=ref, base_ref=self._base_ref)
