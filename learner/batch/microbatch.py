"""A batch cut by rows: for the workers of a step, and for the memory of one forward pass.

Weights are those of the whole batch, so the losses and gradients of the parts add up to its own.

Shapes:  B rows   S slots of the widest row   E choices of a part   R rows of it
"""

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
from jaxtyping import Int32, Int64

from orchard.types import SequenceTargets, TrainBatch, ValueTargets


def shard(batch: TrainBatch, rank: int, world: int) -> TrainBatch:
    """The rows of one of `world` workers, dealt by length so that all have alike much to do.

    All shards have equally many rows, rows of padding included. `forward_tokens` is the shard's
    own; `flat_tokens` stays that of the whole batch, which alone knows its candidates.
    """
    order = np.argsort(-row_lengths(batch), kind="stable")
    return _select(batch, order[rank::world], num_rows=-(-len(order) // world))


def micro_batches(batch: TrainBatch, max_tokens: int) -> Iterator[TrainBatch]:
    """Parts of at most `max_tokens` slots, padding included; a wider row goes alone.

    Rows are taken longest first, so that those of a part are alike. Rows of padding are left out,
    but one part there always is: every worker of a step has to take part in its reductions.
    """
    length = row_lengths(batch)
    order = np.argsort(-length, kind="stable")
    order = order[: max(1, int((length > 0).sum()))]
    while len(order):
        count = max(1, max_tokens // max(1, int(length[order[0]])))
        yield _select(batch, order[:count], num_rows=min(count, len(order)))
        order = order[count:]


def row_lengths(batch: TrainBatch) -> Int64[np.ndarray, " B"]:
    """Number of slots of each row that are not padding."""
    return (batch.subtree_end > 0).sum(1)


def _select(batch: TrainBatch, rows: Int64[np.ndarray, " R"], *, num_rows: int) -> TrainBatch:
    """The given rows, cut to the longest of them, and rows of padding up to `num_rows`."""
    length = row_lengths(batch)[rows]
    width = max(1, int(length.max(initial=0)))
    place = np.full(len(batch.token), -1, np.int64)
    place[rows] = np.arange(len(rows))
    kept = np.flatnonzero(place[batch.row] >= 0)

    def table(values: Int32[np.ndarray, "B S"]) -> Int32[np.ndarray, "R width"]:
        part = np.zeros((num_rows, width), np.int32)
        part[: len(rows)] = values[rows, :width]
        return part

    return replace(
        batch,
        values=None if batch.values is None else _select_states(batch.values, place),
        sequences=None
        if batch.sequences is None
        else _select_sequences(batch.sequences, place, kept, len(batch.row)),
        token=table(batch.token),
        position=table(batch.position),
        subtree_end=table(batch.subtree_end),
        row=place[batch.row[kept]],
        query_slot=batch.query_slot[kept],
        state=batch.state[kept],
        chosen=batch.chosen[kept],
        behaviour_logprob=batch.behaviour_logprob[kept],
        advantage_pos=batch.advantage_pos[kept],
        advantage_neg=batch.advantage_neg[kept],
        kl_weight=batch.kl_weight[kept],
        forward_tokens=int(length.sum()),
    )


def _select_states(values: ValueTargets, place: Int64[np.ndarray, " B"]) -> ValueTargets:
    """The states of the rows that have a place, renumbered to it."""
    kept = place[values.row] >= 0
    states = {f.name: getattr(values, f.name)[kept] for f in fields(ValueTargets)}
    return ValueTargets(**states | {"row": place[states["row"]]})


def _select_sequences(
    whole: SequenceTargets,
    place: Int64[np.ndarray, " B"],
    choice: Int64[np.ndarray, " E"],
    num_choices: int,
) -> SequenceTargets:
    """The candidates of the rows that have a place; they and the kept choices are renumbered."""
    candidate = np.flatnonzero(place[whole.row] >= 0)
    new_candidate, new_choice = np.full(len(whole.row), -1), np.full(num_choices, -1)
    new_candidate[candidate], new_choice[choice] = np.arange(len(candidate)), np.arange(len(choice))
    pair = np.flatnonzero(new_candidate[whole.candidate] >= 0)
    return SequenceTargets(
        row=place[whole.row[candidate]],
        advantage=whole.advantage[candidate],
        length=whole.length[candidate],
        choice=new_choice[whole.choice[pair]],
        candidate=new_candidate[whole.candidate[pair]],
    )
