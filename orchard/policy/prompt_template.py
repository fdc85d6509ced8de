"""Encode and fill prompt templates: `<bos>` or an instruction around the items.

The prompt of a compact policy is `<bos>` and codes, that of a text policy an instruction with items
in its middle. Both have one form: tokens before the items, between two items, and after the last
one. These pieces are tokenized separately, so that every component builds the same prompt. The
template is saved with the policy's tokenizer, like a chat template.

Shapes:  H items of all rows   R rows (R1 = R + 1)   T tokens   I1 = catalog items + 1
         E tokens after an item   U tokens before the first item
"""

from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Int, Int32, Int64
from transformers import PreTrainedTokenizerBase

from orchard import ragged
from orchard.errors import ConfigError
from orchard.settings import PromptConfig

_KEY = "orchard_frame"
"""Key of the template in `init_kwargs` of a tokenizer, which `save_pretrained` saves and the loader
restores."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Token IDs around the items of a prompt."""

    before: tuple[int, ...]
    """Tokens before the first item."""
    between: tuple[int, ...] = ()
    """Tokens between two items."""
    after: tuple[int, ...] = ()
    """Tokens after the last item."""
    limit: int = 1 << 30
    """Maximum number of tokens of a prompt; the oldest items are dropped first."""

    @property
    def size(self) -> int:
        """Number of tokens of a prompt without items."""
        return len(self.before) + len(self.after)


def fill_template(
    template: PromptTemplate,
    item_tokens: tuple[Int32[np.ndarray, " T"], Int64[np.ndarray, " I1"]],
    item: Int64[np.ndarray, " H"],
    start: Int64[np.ndarray, " R1"],
    context: tuple[Int32[np.ndarray, "H E"], Int32[np.ndarray, "R U"]] | None = None,
) -> tuple[Int32[np.ndarray, " T2"], Int64[np.ndarray, " R1"]]:
    """Build a prompt for each row of items; whole oldest items are dropped until it fits.

    Args:
        template: tokens around the items.
        item_tokens: tokens of every item of the catalog, ragged.
        item: catalog rows, oldest first.
        start: row r holds the items `start[r] : start[r + 1]`.
        context: tokens right after each item, -1 for none, and before the first item of each row.
    """
    row, num_rows = ragged.row_of(start), len(start) - 1
    # Tokens of each item of the rows: a catalog may have millions that no row names.
    history_token, history_start = ragged.take(*item_tokens, item)
    # One opening for all rows or, with context, one for each.
    opening = np.array([template.before], np.int32)
    if context is not None:
        after, lead = context
        count = (after >= 0).sum(1)  # (H,) tokens that follow each item
        place = np.repeat(history_start[1:], count)
        history_token = np.insert(history_token, place, after[after >= 0])
        history_start = history_start + ragged.starts(count)
        opening = np.concatenate([opening.repeat(num_rows, axis=0), lead], axis=1)
    total = ragged.starts(np.diff(history_start) + len(template.between))
    # (H,) tokens from each item to the end of its row; no separator follows the last item
    rest = total[start[1:]][row] - total[:-1] - len(template.between)
    room = template.limit - opening.shape[1] - len(template.after)
    kept = rest <= room
    count = np.bincount(row[kept], minlength=num_rows)
    # Pieces that prompts consist of: the items of all rows, then openings, between and after.
    edges = (np.array(tokens, np.int32) for tokens in (template.between, template.after))
    pieces, piece_start = ragged.concatenate(
        [
            (history_token, history_start),
            (opening.reshape(-1), np.arange(len(opening) + 1) * opening.shape[1]),
            *((edge, np.array([0, len(edge)])) for edge in edges),
        ]
    )
    between = len(item) + len(opening)  # piece index of `between`; `after` follows
    prompt_start = ragged.starts(np.maximum(2 * count, 1) + 1)  # first piece of each prompt
    # Piece index of each position of all prompts: filled with `between`, then overwritten.
    piece = np.full(int(prompt_start[-1]), between, dtype=np.int64)
    piece[prompt_start[:-1]] = len(item) + (0 if context is None else np.arange(num_rows))
    piece[prompt_start[1:] - 1] = between + 1
    position = ragged.index_in_row(ragged.starts(count))  # position of each kept item in its row
    piece[prompt_start[:-1][row[kept]] + 1 + 2 * position] = np.flatnonzero(kept)
    token, token_start = ragged.take(pieces, piece_start, piece)
    return token, token_start[prompt_start]


def encode_template(
    template: str,
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptConfig,
    *,
    limit: int,
) -> PromptTemplate:
    """Tokenize a template with one placeholder `place`, such as "{history}".

    Raises:
        ConfigError: the settings require a chat template that the tokenizer lacks, or the
            instruction alone has more than `limit` tokens.
    """
    lead: list[int] = []
    if settings.chat:
        if not tokenizer.chat_template:
            raise ConfigError(
                "prompt.chat = true, and the tokenizer has no chat template; set it to false"
            )
        messages = [{"role": "user", "content": template}]
        template = cast(
            str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    else:
        specials: list[int] = tokenizer.encode("")
        lead = specials[:1] if specials[:1] == [tokenizer.bos_token_id] else []
    head, _, tail = template.partition(place)
    before, between, after = (
        tuple(tokenizer.encode(text, add_special_tokens=False))
        for text in (head, settings.separator, tail)
    )
    encoded = PromptTemplate(before=(*lead, *before), between=between, after=after, limit=limit)
    if encoded.size > limit:
        raise ConfigError(
            f"the instruction alone has {encoded.size} tokens, but the policy has room for {limit} "
            "besides its answer; shorten the template, or raise prompt.max_tokens if it is set"
        )
    return encoded


def save_to_tokenizer(tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> None:
    """Store the template in the tokenizer, which then saves and loads it."""
    tokenizer.init_kwargs[_KEY] = asdict(template)


def load_from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate | None:
    """Return the template stored in a tokenizer, or None."""
    saved = cast("dict[str, Any] | None", tokenizer.init_kwargs.get(_KEY))
    if saved is None:
        return None
    parts = {name: tuple(saved[name]) for name in ("before", "between", "after")}
    return PromptTemplate(**parts, limit=saved["limit"])


def check_fits(text_start: Int[np.ndarray, " R1"], template: PromptTemplate, what: str) -> None:
    """Raise ConfigError if the longest text does not fit into the template.

    Args:
        text_start: start of each text in the ragged array of all texts.
        template: template that receives one text.
        what: name of the texts, for messages.
    """
    longest = int(np.diff(text_start).max(initial=0))
    if longest + template.size > template.limit:
        raise ConfigError(
            f"the longest {what} has {longest} tokens and its question {template.size}, the policy "
            f"has room for {template.limit}; raise prompt.max_tokens, or set that task to 0"
        )
