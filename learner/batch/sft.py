"""The supervised warm start: whole user sequences, one row each, in the same batch as RL uses.

A window of a user's items is a chain of single-code nodes, so it packs as a tree without branches
and is scored by the same function. The loss is the mean negative log-probability of the codes of
the fresh items, under the trie-renormalised policy (forced codes drop out by themselves) or over
the whole vocabulary.

Other policies are shown questions and learn the answers alone: one that is to think a row of the
split with its rationale, of which it learns what it would choose in a rollout (the text of each
block, its closing tag, and the codes of the target), a text model the tasks of
`orchard.data.sft_tasks`.

Shapes:  B rows   Q1 entries of starts   T tokens   E choices
"""

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from orchard import ragged
from orchard.data.prompts import Split, TrainingWindows, code_states, make_prompts
from orchard.data.rationales import TokenizedRationales
from orchard.data.sft_tasks import SftExamples
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import PolicyVersion, Prompts, SearchTrees, TrainBatch


def pack_sequences(
    sequences: TrainingWindows,
    rows: Int64[np.ndarray, " B"],
    tokenizer: ItemTokenizer,
    policy: PolicyVersion,
    *,
    forced: bool = False,
) -> TrainBatch:
    """The chosen windows as a batch; `gain` holds each choice's share of the mean.

    `forced` counts codes without an alternative among the choices: over the whole vocabulary they
    are something to learn.
    """
    item, start = ragged.take(sequences.item, sequences.start, rows)
    token, token_start = tokenizer.encode_history(item, start)
    owner, place = ragged.owners(start), ragged.places(start)
    before, after = code_states(tokenizer.catalog, item)
    exists = after >= 0
    # A code is predicted by the slot before it, which counts the codes of all earlier items.
    codes = exists.sum(1)
    first = np.cumsum(codes) - codes
    first -= np.repeat(first[start[:-1]], np.diff(start))
    slot = first[:, None] + np.arange(exists.shape[1])
    children = tokenizer.catalog.trie.num_children(torch.from_numpy(before[exists])).numpy()
    free = exists.copy()
    free[exists] = forced | (children > 1)
    chosen = free & (place >= sequences.fresh[rows][owner])[:, None]
    row = np.broadcast_to(owner[:, None], exists.shape)[chosen]
    return _batch(
        tokenizer, policy, token, token_start, row, slot[chosen], before[chosen], after[chosen]
    )


def pack_traces(
    split: Split,
    traces: TokenizedRationales,
    rows: Int64[np.ndarray, " B"],
    tokenizer: ItemTokenizer,
    policy: PolicyVersion,
    *,
    forced: bool = False,
) -> TrainBatch:
    """The chosen rows with their rationales as a batch; `forced` as in `pack_sequences`.

    Opening tags are forced in rollouts, and so are read but not learned here.
    """
    prompts = make_prompts(tokenizer, split, rows)
    assert tokenizer.think is not None, "rationales need a vocabulary with tags"
    examples = SftExamples(
        asked=(prompts.token, prompts.token_start),
        written=traces.of(rows),
        target=split.target[rows],
    )
    return pack_examples(examples, tokenizer, policy, forced=forced, unlearned=tokenizer.think.open)


def pack_answers(prompts: Prompts, tokenizer: ItemTokenizer, policy: PolicyVersion) -> TrainBatch:
    """Each prompt with the codes of its target."""
    nothing = np.zeros(0, np.int32), np.zeros(len(prompts) + 1, np.int64)
    asked = prompts.token, prompts.token_start
    return pack_examples(
        SftExamples(asked=asked, written=nothing, target=prompts.target), tokenizer, policy
    )


def pack_examples(
    examples: SftExamples,
    tokenizer: ItemTokenizer,
    policy: PolicyVersion,
    *,
    forced: bool = False,
    unlearned: int = -1,
) -> TrainBatch:
    """Questions and answers as a batch; `forced` as in `pack_sequences`.

    Written text is learned but for the token `unlearned`.
    """
    (asked, asked_start), (text, text_start) = examples.asked, examples.written
    item = examples.target[examples.target >= 0]
    before, after = code_states(tokenizer.catalog, item)
    exists = after >= 0
    codes, _ = ragged.take(*tokenizer.item_tokens, item)
    depth = np.zeros(len(examples.target), np.int64)
    depth[examples.target >= 0] = exists.sum(1)
    shown, written = np.diff(asked_start), np.diff(text_start)
    start = ragged.starts(shown + written + depth)
    place, owner = ragged.places(start), ragged.owners(start)
    kind = (place >= shown[owner]).astype(int) + (place >= (shown + written)[owner])
    token = np.empty(len(place), np.int32)
    token[kind == 0], token[kind == 1], token[kind == 2] = asked, text, codes
    learned = np.flatnonzero((kind == 1) & (token != unlearned))
    children = tokenizer.catalog.trie.num_children(torch.from_numpy(before[exists])).numpy()
    free = forced | (children > 1)
    chosen = np.concatenate([learned, np.flatnonzero(kind == 2)[free]])
    nowhere = np.full(len(learned), SearchTrees.FREE_TEXT)
    return _batch(
        tokenizer,
        policy,
        token,
        start,
        owner[chosen],
        place[chosen] - 1,
        np.concatenate([nowhere, before[exists][free]]),
        np.concatenate([token[learned].astype(np.int64), after[exists][free]]),
    )


def _batch(
    tokenizer: ItemTokenizer,
    policy: PolicyVersion,
    token: Int32[np.ndarray, " T"],
    start: Int64[np.ndarray, " Q1"],
    row: Int64[np.ndarray, " E"],
    slot: Int64[np.ndarray, " E"],
    state: Int64[np.ndarray, " E"],
    edge: Int64[np.ndarray, " E"],
) -> TrainBatch:
    """Rows without branches and their choices, each with its share of the mean."""
    length, count = np.diff(start), len(row)
    return TrainBatch(
        token=ragged.pad(token, start, fill=tokenizer.pad),
        position=ragged.pad(ragged.places(start).astype(np.int32), start, fill=0),
        subtree_end=ragged.pad(np.repeat(length, length).astype(np.int32), start, fill=0),
        row=row.astype(np.int64),
        query_slot=slot.astype(np.int32),
        state=state,
        chosen=edge,
        behaviour_logprob=np.zeros(count, np.float32),
        advantage_pos=np.full(count, 1.0 / max(1, count), np.float32),
        advantage_neg=np.zeros(count, np.float32),
        kl_weight=np.zeros(count, np.float32),
        forward_tokens=int(length.sum()),
        flat_tokens=int(length.sum()),
        policy=policy,
        catalog=tokenizer.catalog.digest,
    )


def weighted_nll(
    logprob: Float32[Tensor, " E"], gain: Float32[Tensor, " E"]
) -> Float32[Tensor, ""]:
    """Mean negative log-probability of the choices."""
    return -(logprob * gain).sum()
