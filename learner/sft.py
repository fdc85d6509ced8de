"""The supervised warm start: whole user sequences, one row each, in the same batch as RL uses.

A window of a user's items is a chain of single-code nodes, so it packs as a tree without branches
and is scored by the same function. The loss is the mean negative log-probability of the codes of
the fresh items, under the trie-renormalised policy (forced codes drop out by themselves) or over
the whole vocabulary.
"""

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from orchard import ragged
from orchard.prompts import PromptFormat, Sequences, code_states
from orchard.types import PolicyVersion, TrainBatch


def pack_sequences(
    sequences: Sequences,
    rows: Int64[np.ndarray, " B"],
    form: PromptFormat,
    policy: PolicyVersion,
    *,
    forced: bool = False,
) -> TrainBatch:
    """The chosen windows as a batch; `gain` holds each choice's share of the mean.

    `forced` counts codes without an alternative among the choices: over the whole vocabulary they
    are something to learn.
    """
    item, start = ragged.take(sequences.item, sequences.start, rows)
    token, token_start = form.tokens(item, start)
    length = np.diff(token_start)
    owner, place = ragged.owners(start), ragged.places(start)
    before, after = code_states(form.catalogue, item)
    exists = after >= 0
    # A code is predicted by the slot before it, which counts the codes of all earlier items.
    codes = exists.sum(1)
    first = np.cumsum(codes) - codes
    first -= np.repeat(first[start[:-1]], np.diff(start))
    slot = first[:, None] + np.arange(exists.shape[1])
    children = form.catalogue.trie.num_children(torch.from_numpy(before[exists])).numpy()
    free = exists.copy()
    free[exists] = forced | (children > 1)
    chosen = free & (place >= sequences.fresh[rows][owner])[:, None]
    row = np.broadcast_to(owner[:, None], exists.shape)[chosen]
    count = len(row)
    return TrainBatch(
        token=ragged.pad(token, token_start, fill=form.vocabulary.pad),
        position=ragged.pad(ragged.places(token_start).astype(np.int32), token_start, fill=0),
        subtree_end=ragged.pad(np.repeat(length, length).astype(np.int32), token_start, fill=0),
        row=row.astype(np.int64),
        slot=slot[chosen].astype(np.int32),
        state=before[chosen],
        edge=after[chosen],
        behaviour_logprob=np.zeros(count, np.float32),
        gain=np.full(count, 1.0 / max(1, count), np.float32),
        loss=np.zeros(count, np.float32),
        kl_weight=np.zeros(count, np.float32),
        forward_tokens=int(length.sum()),
        flat_tokens=int(length.sum()),
        policy=policy,
        catalogue=form.catalogue.digest,
    )


def nll(logprob: Float32[Tensor, " E"], gain: Float32[Tensor, " E"]) -> Float32[Tensor, ""]:
    """Mean negative log-probability of the choices."""
    return -(logprob * gain).sum()
