"""What stands around the items that a policy reads: a bare `<bos>`, or an instruction.

A compact policy reads `<bos>` and codes, a text policy an instruction with items in its middle.
Both are a frame: tokens before the items, between two of them, and after the last. Pieces are
tokenised apart, so that a prompt is the same whichever room builds it. The frame travels with the
policy's tokenizer, as chat templates do.

Shapes:  H items of all rows   R1 = rows + 1   T tokens   W1 = words + 1
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
"""In what a tokenizer was made with, which `save_pretrained` writes and the next loader reads."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Token ids around the items of a prompt."""

    before: tuple[int, ...]
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    limit: int = 1 << 30
    """Tokens of a whole prompt; the oldest items give way."""

    @property
    def size(self) -> int:
        """Tokens of a prompt without items."""
        return len(self.before) + len(self.after)


def fill_template(
    frame: PromptTemplate,
    words: tuple[Int32[np.ndarray, " T"], Int64[np.ndarray, " W1"]],
    item: Int64[np.ndarray, " H"],
    start: Int64[np.ndarray, " R1"],
) -> tuple[Int32[np.ndarray, " T2"], Int64[np.ndarray, " R1"]]:
    """A prompt for each row of items, whole items dropped from the left until it fits.

    Args:
        frame: around them.
        words: tokens of every item of the catalog, ragged.
        item: catalog rows, oldest first.
        start: row r holds the items `start[r] : start[r + 1]`.
    """
    word, word_start = words
    owner, rows = ragged.owners(start), len(start) - 1
    total = ragged.starts(np.diff(word_start)[item] + len(frame.between))
    # Tokens from an item to the end of its row, where the last one is followed by no separator.
    rest = total[start[1:]][owner] - total[:-1] - len(frame.between)
    kept = rest <= frame.limit - frame.size
    item, count = item[kept], np.bincount(owner[kept], minlength=rows)
    # Every prompt as numbers of pieces: the words, then before, between and after.
    edges = (np.array(one, np.int32) for one in (frame.before, frame.between, frame.after))
    pieces, piece_start = ragged.concatenate(
        [(word, word_start), *((edge, np.array([0, len(edge)])) for edge in edges)]
    )
    before = len(word_start) - 1
    bounds = ragged.starts(np.maximum(2 * count, 1) + 1)
    piece = np.full(int(bounds[-1]), before + 1, dtype=np.int64)
    piece[bounds[:-1]], piece[bounds[1:] - 1] = before, before + 2
    place = ragged.places(ragged.starts(count))
    piece[bounds[:-1][owner[kept]] + 1 + 2 * place] = item
    token, token_start = ragged.take(pieces, piece_start, piece)
    return token, token_start[bounds]


def encode_template(
    template: str,
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptConfig,
    *,
    limit: int,
) -> PromptTemplate:
    """The frame of a template with one `place`, such as "{history}".

    Raises:
        ConfigError: the tokenizer has no chat template and is to use one, or the instruction alone
            has more than `limit` tokens.
    """
    lead: list[int] = []
    if settings.chat:
        if not tokenizer.chat_template:
            raise ConfigError(
                "prompt.chat = true, and the tokenizer has no chat template; set it to false"
            )
        said = [{"role": "user", "content": template}]
        template = cast(
            str, tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        )
    else:
        specials: list[int] = tokenizer.encode("")
        lead = specials[:1] if specials[:1] == [tokenizer.bos_token_id] else []
    head, _, tail = template.partition(place)
    before, between, after = (
        tuple(tokenizer.encode(text, add_special_tokens=False))
        for text in (head, settings.separator, tail)
    )
    frame = PromptTemplate(before=(*lead, *before), between=between, after=after, limit=limit)
    if frame.size > limit:
        raise ConfigError(
            f"the instruction alone has {frame.size} tokens, the policy has room for {limit} "
            "beside its answer; shorten the template, or raise prompt.max_tokens if it is set"
        )
    return frame


def save_to_tokenizer(tokenizer: PreTrainedTokenizerBase, frame: PromptTemplate) -> None:
    """Let the frame travel with the tokenizer from now on."""
    tokenizer.init_kwargs[_KEY] = asdict(frame)


def load_from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate | None:
    """The frame that came with a tokenizer, if one did."""
    saved = cast("dict[str, Any] | None", tokenizer.init_kwargs.get(_KEY))
    if saved is None:
        return None
    parts = {name: tuple(saved[name]) for name in ("before", "between", "after")}
    return PromptTemplate(**parts, limit=saved["limit"])


def check_fits(text: Int[np.ndarray, " R1"], frame: PromptTemplate, what: str) -> None:
    """Raise ConfigError where a text, given the starts of all, leaves no room for its question."""
    longest = int(np.diff(text).max(initial=0))
    if longest + frame.size > frame.limit:
        raise ConfigError(
            f"the longest {what} has {longest} tokens and its question {frame.size}, the policy "
            f"has room for {frame.limit}; raise prompt.max_tokens, or set that task to 0"
        )
