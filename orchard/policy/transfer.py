"""Pack the weights of a policy for the way from the learner to its holders, verify and unpack them.

format      tensors that travel                                        what completes them
float32     every parameter, with adapters merged                      nothing
bfloat16    the same, each value rounded to the nearest                nothing
adapter     LoRA factors, and what else is trained (only the rows      the base: every parameter
            of a table that differ from the base)                      before its adapter

A holder makes the weights of an adapter transfer of the base and the transfer alone, whatever it
has loaded before, by the learner's own arithmetic. So a hundred transfers give the same bits as the
last of them, and as a float32 transfer of the same version.

A transfer is verified where it arrives by its BLAKE3 digest, which is faster than the SHA-256 of
files at rest. The digest names the version, and travels apart from the tensors.

Shapes:  M rows of a table   N columns   R rows that travel
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from blake3 import blake3
from jaxtyping import Float32, Int64

from orchard.errors import EngineError
from orchard.policy.lora import AdapterFactors, merge
from orchard.policy.weights import Weights

TransferFormat = Literal["float32", "bfloat16", "adapter"]
_BITS = np.uint16
"""Type of the bits of a bfloat16 value, which numpy has no type for."""
_CHUNK = 1 << 12
"""Rows of a table that are compared at once."""


LOST = (
    "published weights were lost with the learner that stored them, which has not published them "
    "again; the same command resumes from the newest checkpoint"
)
"""Message of a WeightsLostError."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightTransfer:
    """Weights of a policy version in one of the formats."""

    tensors: Mapping[str, np.ndarray]
    """Values by parameter name: float32, or the bits of bfloat16 as uint16."""
    rows: Mapping[str, Int64[np.ndarray, " R"]] = field(default_factory=dict[str, np.ndarray])
    """Rows of the tables of which `tensors` has these rows alone."""
    adapters: Mapping[str, AdapterFactors] = field(default_factory=dict[str, AdapterFactors])
    """Adapters by the name of the weight that each is merged into."""
    base: str = ""
    """Digest of the base transfer that completes this one; empty where nothing is missing."""

    @property
    def changed(self) -> set[str]:
        """Names of the parameters that may differ from those of the base."""
        return {*self.tensors, *self.adapters}

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return sum(array.nbytes for _, array in _arrays(self))


class BaseMismatchError(EngineError):
    """The transfer is for another base than the one at hand."""


def digest(transfer: WeightTransfer, *, threads: int = 1) -> str:
    """Return the BLAKE3 of everything in a transfer, independent of the order of its mappings."""
    hasher = blake3(max_threads=threads)
    hasher.update(f"base {transfer.base};".encode())
    for name, array in _arrays(transfer):
        hasher.update(f"{name}:{array.dtype}:{array.shape};".encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def _arrays(transfer: WeightTransfer) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every array of a transfer with a name, in a fixed order."""
    for name in sorted(transfer.tensors):
        yield name, transfer.tensors[name]
    for name in sorted(transfer.rows):
        yield f"{name} rows", transfer.rows[name]
    for name in sorted(transfer.adapters):
        adapter = transfer.adapters[name]
        yield f"{name} up", adapter.up
        yield f"{name} down", adapter.down
        yield f"{name} scaling", np.array([adapter.scaling])


def check_digest(transfer: WeightTransfer, expected: str, *, threads: int = 1) -> None:
    """Raise EngineError unless a transfer has the digest that was published."""
    if (actual := digest(transfer, threads=threads)) != expected:
        raise EngineError(
            f"weights with digest {actual[:8]} arrived where {expected[:8]} were published; "
            "publish them again"
        )


def pack(weights: Weights, *, rounded: bool = False) -> WeightTransfer:
    """Pack all weights, uncopied in float32, or rounded to bfloat16."""
    if rounded:
        weights = {name: _rounded(value) for name, value in weights.items()}
    return WeightTransfer(tensors=weights)


def pack_adapters(
    trained: Weights, adapters: Mapping[str, AdapterFactors], *, base: Weights, digest: str
) -> WeightTransfer:
    """Pack adapters, and of the parameters that are trained in full what differs from the base.

    Args:
        trained: parameters that are trained in full.
        adapters: adapters by the name of their weight.
        base: weights that holders have or get.
        digest: digest of the transfer of the base.
    """
    tensors: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    for name, value in trained.items():
        tensors[name] = value
        if value.ndim == 2:
            differing = _differing_rows(value, base[name])
            if 2 * len(differing) < len(value):
                tensors[name], rows[name] = value[differing], differing
    return WeightTransfer(tensors=tensors, rows=rows, adapters=adapters, base=digest)


def _differing_rows(
    value: Float32[np.ndarray, "M N"], base: Float32[np.ndarray, "M N"]
) -> Int64[np.ndarray, " R"]:
    """Return the rows that are not the same bits, chunk by chunk."""
    new, old = (np.ascontiguousarray(table).view(np.uint32) for table in (value, base))
    starts = range(0, len(new), _CHUNK)
    parts = [
        at + np.flatnonzero((new[at : at + _CHUNK] != old[at : at + _CHUNK]).any(axis=1))
        for at in starts
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def unpack(transfer: WeightTransfer, base: WeightTransfer | None = None) -> Weights:
    """Return the weights of a transfer in float32; each is made when it is asked for.

    Raises:
        BaseMismatchError: the transfer needs a base, and there is none.
    """
    if transfer.base and base is None:
        raise BaseMismatchError(
            f"adapters for base {transfer.base[:8]} arrived without it; publish its full weights"
        )
    return _Unpacked(transfer, base if transfer.base else None)


class _Unpacked(Mapping[str, np.ndarray]):
    """Weights that are made one by one."""

    def __init__(self, transfer: WeightTransfer, base: WeightTransfer | None) -> None:
        self._transfer, self._base = transfer, {} if base is None else base.tensors
        self._names: Collection[str] = transfer.tensors if base is None else base.tensors

    def __getitem__(self, name: str) -> np.ndarray:
        transfer = self._transfer
        if name in transfer.adapters:
            return merge(self._base[name], transfer.adapters[name])
        if name in transfer.rows:
            table = np.array(self._base[name])
            table[transfer.rows[name]] = transfer.tensors[name]
            return table
        if name not in transfer.tensors:
            return self._base[name]
        value = transfer.tensors[name]
        return _widened(value) if value.dtype == _BITS else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _rounded(value: Float32[np.ndarray, "..."]) -> np.ndarray:
    """Return the bits of the nearest bfloat16 values."""
    return torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().view(_BITS)


def _widened(bits: np.ndarray) -> Float32[np.ndarray, "..."]:
    """Return the float32 values of bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
