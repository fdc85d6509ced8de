"""Split a batch by rows: into shards for data parallelism and micro-batches that fit in memory.

Weights stay those of the whole batch, so the losses and gradients of the parts add up to those of
the whole.

Shapes:  B rows   S slots of the widest row   E choices of a part   R rows of a part
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import Int32, Int64

from orchard import arrays
from orchard.targets import CodeTargets, SequenceTargets, ValueTargets
from orchard.types import TrainBatch

_DROPPED = -1
"""Mark of a row, candidate or choice that is not in the part."""


def shard(batch: TrainBatch, rank: int, world: int) -> TrainBatch:
    """Select the rows of one of `world` workers, dealt out by length to balance the work.

    All shards have the same number of rows, rows of padding included. `forward_tokens` counts the
    shard's tokens; `flat_tokens` stays that of the whole batch, since a shard lacks the candidates
    to count it.
    """
    order = np.argsort(-row_lengths(batch), kind="stable")
    return _select(batch, order[rank::world], num_rows=-(-len(order) // world))


def micro_batches(batch: TrainBatch, max_tokens: int) -> Iterator[TrainBatch]:
    """Yield parts of at most `max_tokens` slots, padding included; a wider row is a part alone.

    Rows are taken longest first, so that the rows of a part have similar lengths. Rows of padding
    are left out, but there is always at least one part: every worker has to take part in the
    collective operations of a step.
    """
    length = row_lengths(batch)
    order = np.argsort(-length, kind="stable")
    order = order[: max(1, int((length > 0).sum()))]
    while len(order):
        count = max(1, max_tokens // max(1, int(length[order[0]])))
        yield _select(batch, order[:count], num_rows=min(count, len(order)))
        order = order[count:]


def row_lengths(batch: TrainBatch) -> Int64[np.ndarray, " B"]:
    """Count the slots of each row that are not padding."""
    return (batch.subtree_end > 0).sum(1)


def _select(batch: TrainBatch, rows: Int64[np.ndarray, " R"], *, num_rows: int) -> TrainBatch:
    """Select rows, cut to the longest of them, and append rows of padding up to `num_rows`."""
    length = row_lengths(batch)[rows]
    width = max(1, int(length.max(initial=0)))
    # [B] row of the part that each row becomes, _DROPPED for the others
    new_row = np.full(len(batch.token), _DROPPED, np.int64)
    new_row[rows] = np.arange(len(rows))
    # [E] indices of the choices in the selected rows
    kept = np.flatnonzero(new_row[batch.row] >= 0)

    def table(values: Int32[np.ndarray, "B S"]) -> Int32[np.ndarray, "R width"]:
        part = np.zeros((num_rows, width), np.int32)
        part[: len(rows)] = values[rows, :width]
        return part

    part = arrays.take(batch, kept, axis="E")
    return replace(
        part,
        values=None if batch.values is None else _select_states(batch.values, new_row),
        sequences=None
        if batch.sequences is None
        else _select_sequences(batch.sequences, new_row, kept, len(batch.row)),
        codes=None if batch.codes is None else _select_codes(batch.codes, new_row),
        token=table(batch.token),
        position=table(batch.position),
        subtree_end=table(batch.subtree_end),
        row=new_row[part.row],
        forward_tokens=int(length.sum()),
    )


def without_choices(batch: TrainBatch) -> TrainBatch:
    """Return one row of the batch without choices: no loss, but a backward pass for collectives."""
    none = np.zeros(0, np.int64)
    part = arrays.take(batch, np.zeros(1, np.int64), axis="B")
    values, sequences, codes = batch.values, batch.sequences, batch.codes
    if values is not None:
        values = arrays.take(values, none, axis="V")
    if sequences is not None:
        sequences = arrays.take(arrays.take(sequences, none, axis="Q"), none, axis="P")
    if codes is not None:
        codes = arrays.take(codes, none, axis="Z")
    part = arrays.take(part, none, axis="E")
    return replace(part, values=values, sequences=sequences, codes=codes)


def _select_states(values: ValueTargets, new_row: Int64[np.ndarray, " B"]) -> ValueTargets:
    """Select the states of the kept rows and renumber their rows."""
    part = arrays.take(values, np.flatnonzero(new_row[values.row] >= 0), axis="V")
    return replace(part, row=new_row[part.row])


def _select_codes(codes: CodeTargets, new_row: Int64[np.ndarray, " B"]) -> CodeTargets:
    """Select the codes of the kept rows and renumber their rows."""
    part = arrays.take(codes, np.flatnonzero(new_row[codes.row] >= 0), axis="Z")
    return replace(part, row=new_row[part.row])


def _select_sequences(
    sequences: SequenceTargets,
    new_row: Int64[np.ndarray, " B"],
    choice: Int64[np.ndarray, " E"],
    num_choices: int,
) -> SequenceTargets:
    """Select the candidates of the kept rows; renumber them and the kept choices.

    Args:
        sequences: candidates of the batch.
        new_row: new number of each row, `_DROPPED` for the others.
        choice: indices of the kept choices.
        num_choices: number of choices of the batch.
    """
    candidate = np.flatnonzero(new_row[sequences.row] >= 0)
    # new number of each old candidate and choice, _DROPPED for the others
    new_candidate = np.full(len(sequences.row), _DROPPED)
    new_choice = np.full(num_choices, _DROPPED)
    new_candidate[candidate], new_choice[choice] = np.arange(len(candidate)), np.arange(len(choice))
    # indices of the (candidate, choice) pairs of kept candidates
    pair = np.flatnonzero(new_candidate[sequences.candidate] >= 0)
    part = arrays.take(arrays.take(sequences, candidate, axis="Q"), pair, axis="P")
    return replace(
        part,
        row=new_row[part.row],
        choice=new_choice[part.choice],
        candidate=new_candidate[part.candidate],
    )
