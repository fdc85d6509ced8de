"""Build supervised (SFT) batches: whole user sequences, one per row, in the format that RL uses.

A window of a user's items is a chain of single-code nodes, so it packs as a tree without branches
and the same function scores it. The loss is the mean negative log-probability of the codes of the
window's fresh items, under the trie-renormalized policy (where forced codes have log-probability 0)
or over the whole vocabulary.

Other policies are trained on prompts and learn the answers alone. For a policy that thinks, the
prompt is a row of the split and the answer its rationale and target: the policy learns what it
chooses in a rollout (the text of each block, its closing tag, and the codes of the target). For a
text model, the examples are the tasks of `orchard.data.sft_tasks`.

Shapes:  B rows   Q1 entries of starts   T tokens   E choices   I items
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

_NO_TOKEN = -1
"""Value of `unlearned` that equals no token ID."""
_PROMPT, _TEXT, _CODE = 0, 1, 2
"""Kinds of tokens in an example, in their order within a row."""


def pack_sequences(
    sequences: TrainingWindows,
    rows: Int64[np.ndarray, " B"],
    tokenizer: ItemTokenizer,
    policy: PolicyVersion,
    *,
    forced: bool = False,
) -> TrainBatch:
    """Pack the selected windows; `advantage_pos` holds each choice's share of the mean.

    With `forced`, codes without an alternative count among the choices: over the whole vocabulary
    they have to be learned too.
    """
    item, start = ragged.take(sequences.item, sequences.start, rows)
    context = sequences.context and sequences.context.take(sequences.start, rows)
    token, token_start = tokenizer.encode_history(item, start, context)
    # [I] row of each item, and the item's index within its window
    row_of_item, item_index = ragged.row_of(start), ragged.index_in_row(start)
    # [I, code] trie nodes before and after each code, negative past an item's last code
    before, after = code_states(tokenizer.catalog, item)
    exists = after >= 0
    # A code is predicted by the slot before it, which counts the codes of all earlier items and,
    # below, their context.
    num_codes = exists.sum(1)
    # [I] number of codes before each item, first over all rows, then within its row
    codes_before = np.cumsum(num_codes) - num_codes
    codes_before -= np.repeat(codes_before[start[:-1]], np.diff(start))
    query_slot = codes_before[:, None] + np.arange(exists.shape[1])
    if tokenizer.context.columns:  # tokens of the row, and of each earlier item
        query_slot += tokenizer.context.num_row
        query_slot += tokenizer.context.num_event * item_index[:, None]
    num_children = tokenizer.catalog.trie.num_children(torch.from_numpy(before[exists])).numpy()
    is_learnable = exists.copy()
    is_learnable[exists] = forced | (num_children > 1)
    # [I, code] mask of the choices: learnable codes of fresh items
    chosen = is_learnable & (item_index >= sequences.fresh[rows][row_of_item])[:, None]
    row = np.broadcast_to(row_of_item[:, None], exists.shape)[chosen]
    return _chain_batch(
        tokenizer,
        policy,
        token=token,
        start=token_start,
        row=row,
        query_slot=query_slot[chosen],
        state=before[chosen],
        edge=after[chosen],
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
    """Pack the selected rows with their rationales; `forced` as in `pack_sequences`.

    Rollouts force the opening tags, so the policy reads them here but does not learn them.
    """
    prompts = make_prompts(tokenizer, split, rows)
    assert tokenizer.think is not None, "rationales need a vocabulary with tags"
    examples = SftExamples(
        prompt=(prompts.token, prompts.token_start),
        answer=traces.of(rows),
        target=split.target[rows],
    )
    return pack_examples(examples, tokenizer, policy, forced=forced, unlearned=tokenizer.think.open)


def pack_answers(prompts: Prompts, tokenizer: ItemTokenizer, policy: PolicyVersion) -> TrainBatch:
    """Pack each prompt with the codes of its target."""
    no_text = np.zeros(0, np.int32), np.zeros(len(prompts) + 1, np.int64)
    prompt_tokens = prompts.token, prompts.token_start
    return pack_examples(
        SftExamples(prompt=prompt_tokens, answer=no_text, target=prompts.target),
        tokenizer,
        policy,
    )


def pack_examples(
    examples: SftExamples,
    tokenizer: ItemTokenizer,
    policy: PolicyVersion,
    *,
    forced: bool = False,
    unlearned: int = _NO_TOKEN,
) -> TrainBatch:
    """Pack prompts and answers; `forced` as in `pack_sequences`.

    Every token of the answer's text is learned except the token `unlearned`.
    """
    (prompt_token, prompt_start), (text_token, text_start) = examples.prompt, examples.answer
    has_target = examples.target >= 0
    item = examples.target[has_target]
    # [I, code] trie nodes before and after each code of the targets, negative past the last code
    before, after = code_states(tokenizer.catalog, item)
    exists = after >= 0
    code_token, _ = ragged.take(*tokenizer.item_tokens, item)
    num_codes = np.zeros(len(examples.target), np.int64)
    num_codes[has_target] = exists.sum(1)
    num_prompt, num_text = np.diff(prompt_start), np.diff(text_start)
    # [B + 1] start of each row: its prompt, its text and its codes
    start = ragged.starts(num_prompt + num_text + num_codes)
    # [T] slot and row of each token, and its kind
    slot, row = ragged.index_in_row(start), ragged.row_of(start)
    kind = (slot >= num_prompt[row]).astype(int) + (slot >= (num_prompt + num_text)[row])
    token = np.empty(len(slot), np.int32)
    token[kind == _PROMPT], token[kind == _TEXT] = prompt_token, text_token
    token[kind == _CODE] = code_token
    learned = np.flatnonzero((kind == _TEXT) & (token != unlearned))
    num_children = tokenizer.catalog.trie.num_children(torch.from_numpy(before[exists])).numpy()
    is_learnable = forced | (num_children > 1)
    # [E] flat token index of each choice: those of the text first, then those of the codes
    choice = np.concatenate([learned, np.flatnonzero(kind == _CODE)[is_learnable]])
    text_state = np.full(len(learned), SearchTrees.FREE_TEXT)
    return _chain_batch(
        tokenizer,
        policy,
        token=token,
        start=start,
        row=row[choice],
        query_slot=slot[choice] - 1,
        state=np.concatenate([text_state, before[exists][is_learnable]]),
        edge=np.concatenate([token[learned].astype(np.int64), after[exists][is_learnable]]),
    )


def _chain_batch(
    tokenizer: ItemTokenizer,
    policy: PolicyVersion,
    *,
    token: Int32[np.ndarray, " T"],
    start: Int64[np.ndarray, " Q1"],
    row: Int64[np.ndarray, " E"],
    query_slot: Int64[np.ndarray, " E"],
    state: Int64[np.ndarray, " E"],
    edge: Int64[np.ndarray, " E"],
) -> TrainBatch:
    """Build a batch of rows without branches; each choice carries its share of the mean."""
    length, count = np.diff(start), len(row)
    return TrainBatch(
        token=ragged.pad(token, start, fill=tokenizer.pad),
        position=ragged.pad(ragged.index_in_row(start).astype(np.int32), start, fill=0),
        subtree_end=ragged.pad(np.repeat(length, length).astype(np.int32), start, fill=0),
        row=row.astype(np.int64),
        query_slot=query_slot.astype(np.int32),
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
    """Return the mean negative log-probability of the choices."""
    return -(logprob * gain).sum()
