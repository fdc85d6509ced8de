"""Prompts of histories that come as item ids: of requests, of logs, of a caller's own."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from orchard import ragged
from orchard.context import Context, GivenContext
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import Prompts


def history_prompts(
    tokenizer: ItemTokenizer,
    histories: Sequence[Sequence[int] | Int64[np.ndarray, " _"]],
    *,
    max_history: int | None = None,
    prompt_id: Int64[np.ndarray, " B"] | None = None,
    contexts: Sequence[GivenContext | None] | None = None,
) -> tuple[Prompts, list[int]]:
    """Build the prompts of histories; items that the catalog lacks are passed over.

    Args:
        tokenizer: catalog and tokens.
        histories: item ids of each history, oldest first.
        max_history: number of last items that a prompt has; all by default.
        prompt_id: id of each prompt; by default its place.
        contexts: context of each history, values of all its items; by default unknown.

    Returns:
        The prompts, whose targets mean nothing, and the number of items of each history that the
        catalog lacks.

    Raises:
        DataError: the policy does not read such context, or it does not fit its history.
    """
    rows: list[Int64[np.ndarray, " H"]] = []
    unknown: list[int] = []
    events: list[Int64[np.ndarray, "H E"]] = []
    of_rows: list[Int64[np.ndarray, "one U"]] = []
    for number, history in enumerate(histories):
        row, in_catalog = tokenizer.catalog.lookup(np.asarray(history, dtype=np.int64))
        most = max_history or len(row) + 1
        rows.append(row[in_catalog][-most:])
        unknown.append(int((~in_catalog).sum()))
        context = tokenizer.context.read(contexts[number] if contexts else None, len(row))
        events.append(context.event[in_catalog][-most:])
        of_rows.append(context.row)
    # Catalog rows of all histories; history b is flat[start[b] : start[b + 1]].
    start = ragged.starts(np.array([len(each) for each in rows], np.int64))
    flat = np.concatenate([np.zeros(0, np.int64), *rows])
    context = Context(event=np.concatenate(events), row=np.concatenate(of_rows)) if rows else None
    token, token_start = tokenizer.encode_history(flat, start, context)
    prompts = Prompts(
        id=np.arange(len(rows)) if prompt_id is None else prompt_id,
        target=np.zeros(len(rows), np.int64),
        history=flat,
        history_start=start,
        token=token,
        token_start=token_start,
    )
    return prompts, unknown
