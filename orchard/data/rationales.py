"""Load, generate and tokenize rationales, the reasoning texts that SFT shows a thinking policy.

A rationale has one text, a block, for each code of the target. A thinking policy writes
`<think> block </think>` for each block and then the codes (SAPO, arXiv 2605.17648); SFT trains it
on that format. Rationales come with the data or are generated here from titles: block k names what
code k of the recent items and of the target stands for, so that each code has its own block.

Shapes:  R rows   N blocks of all rows   N1 = N + 1   T tokens of all blocks
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log
from pathlib import Path
from string import Formatter

import numpy as np
from jaxtyping import Int32, Int64
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.data.fresh import files_of
from orchard.data.prompts import Split
from orchard.errors import DataError
from orchard.parquet import read_table
from orchard.policy.item_tokenizer import BOS, EOS, PAD, THINK, THOUGHT, sid_token, think_tokens
from orchard.policy.plain_text import encode_texts
from orchard.settings import DataConfig


class CodeToken(str):
    """Name of a code that stands for the token of the code, and not for its letters."""

    __slots__ = ()


Block = str | tuple[str, ...]
"""Text of a block, in parts where some of them are `CodeToken`s."""
RationaleBlocks = Sequence[Block]
"""Blocks of one rationale, one for each code."""


@dataclass(frozen=True, kw_only=True)
class TokenizedRationales:
    """Tokenized rationales of a split: a block for each code of each row, tags included."""

    num_blocks: int
    """Number of blocks of each row."""
    token: Int32[np.ndarray, " T"]
    token_start: Int64[np.ndarray, " N1"]

    def __len__(self) -> int:
        return (len(self.token_start) - 1) // self.num_blocks

    def of(self, rows: Int64[np.ndarray, " R"]) -> tuple[Int32[np.ndarray, " T2"], np.ndarray]:
        """Return the blocks of the selected rows, in their order, as a ragged array by row."""
        return ragged.take(self.token, self.token_start[:: self.num_blocks], rows)


def read(paths: Sequence[Path], column: str, num_blocks: int) -> list[RationaleBlocks]:
    """Read the rationales of one or more Parquet files, in the order of their rows.

    A cell is a list of blocks, or one text with the blocks between `<think>` and `</think>`.

    Raises:
        DataError: the column is missing, or a rationale has another number of blocks.
    """
    rationales: list[RationaleBlocks] = []
    for path in paths:
        table = read_table(path, role="split", columns=(column,), remedy="data.rationales")
        for row, cell in enumerate(table[column].to_pylist()):
            blocks = split_blocks(cell) if isinstance(cell, str) else [str(b) for b in cell or []]
            if len(blocks) != num_blocks:
                raise DataError(
                    f"the rationale of row {row} of {path.name} has {len(blocks)} blocks, an item "
                    f"has {num_blocks} codes; give one block for each code"
                )
            rationales.append(blocks)
    return rationales


def split_blocks(text: str) -> list[str]:
    """Return the texts between the tags, without a block that is not closed."""
    return [part.split(THOUGHT)[0].strip() for part in text.split(THINK)[1:] if THOUGHT in part]


def of_rows(
    data: DataConfig, catalog: Catalog, rows: Split, *, fresh: bool
) -> list[RationaleBlocks] | None:
    """Read the rationales of SFT's rows, or make them from titles; None if not configured.

    Args:
        data: settings that name the column or the template.
        catalog: the catalog.
        rows: training rows, or fresh rows.
        fresh: whether the rows are fresh.
    """
    if data.rationales is not None:
        found = read(files_of(data, fresh=fresh), data.rationales, catalog.trie.depth)
        return found if rows.row is None else [found[row] for row in rows.row.tolist()]
    if data.rationale_template is not None:
        return from_titles(catalog, rows, template=data.rationale_template)
    return None


def tokenize_rationales(
    rationales: Sequence[RationaleBlocks], tokenizer: PreTrainedTokenizerBase, *, cap: int
) -> TokenizedRationales:
    """Tokenize rationales, with the tags around each block; names of special tokens are text.

    Raises:
        DataError: the tokenizer has no single token for a tag, or a block has, with its closing
            tag, more than `cap` tokens.
    """
    tags = think_tokens(tokenizer)
    distinct = list(dict.fromkeys(block for blocks in rationales for block in blocks))
    tokens_of_block: dict[Block, list[int]] = {}
    for block, ids in zip(distinct, _encode_blocks(distinct, tokenizer), strict=True):
        if len(ids) >= cap:
            raise DataError(
                f"the block {''.join(block)[:60]!r} has {len(ids)} tokens and its closing tag, "
                f"more than rollout.think.block_tokens = {cap}; shorten it or raise that"
            )
        tokens_of_block[block] = [tags.open, *ids, tags.close]
    parts = [tokens_of_block[block] for blocks in rationales for block in blocks]
    return TokenizedRationales(
        num_blocks=len(rationales[0]),
        token=np.concatenate([np.array(part, np.int32) for part in parts]),
        token_start=ragged.starts(np.array([len(part) for part in parts])),
    )


def _encode_blocks(blocks: Sequence[Block], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each block: its text, and the tokens of the codes that it names."""
    parts = [(block,) if isinstance(block, str) else block for block in blocks]
    flat = [part for of_block in parts for part in of_block]
    texts = [part for part in flat if not isinstance(part, CodeToken)]
    encoded, vocabulary = iter(encode_texts(tokenizer, texts)), tokenizer.get_vocab()
    ids = iter([vocabulary[p] if isinstance(p, CodeToken) else next(encoded) for p in flat])
    rows: list[list[int]] = []
    for of_block in parts:
        pieces = [next(ids) for _ in of_block]
        rows.append([i for piece in pieces for i in ([piece] if isinstance(piece, int) else piece)])
    return rows


def text_tokenizer(catalog: Catalog, texts: Sequence[str], *, size: int) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer of up to `size` tokens, plus one token for each tag and code."""
    codes = [
        sid_token(level, code) for level, n in enumerate(catalog.level_size) for code in range(n)
    ]
    special = [PAD, BOS, EOS, THINK, THOUGHT, *codes]
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevelDecoder()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=len(special) + max(size, len(alphabet)),
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def code_words(catalog: Catalog) -> list[list[str]]:
    """Select for each code of each level a word that its items' titles share and others lack.

    The word is the one with the largest count times log-lift, with ties broken alphabetically.
    A code whose items have no title gets its own token.
    """
    titles = [sorted(set(title.split())) for title in catalog.title]
    overall = Counter(word for title_words in titles for word in title_words)
    result: list[list[str]] = []
    for level, size in enumerate(catalog.level_size):
        within: list[Counter[str]] = [Counter() for _ in range(size)]
        count = np.bincount(catalog.codes[:, level].clip(min=0), minlength=size)
        for code, title_words in zip(catalog.codes[:, level].tolist(), titles, strict=True):
            if code >= 0:
                within[code].update(title_words)
        result.append([])
        for code, counts in enumerate(within):
            num_titles, num_items = len(titles), count[code]
            gain = {
                w: n * log(n * num_titles / (num_items * overall[w])) for w, n in counts.items()
            }
            best = min(gain, key=lambda w: (-gain[w], w), default=CodeToken(sid_token(level, code)))
            result[-1].append(best)
    return result


def from_titles(
    catalog: Catalog, split: Split, *, template: str, recent: int = 3
) -> list[RationaleBlocks]:
    """Generate a rationale for each row from the words that represent codes (`code_words`).

    Args:
        catalog: items with equally many codes, and titles.
        split: histories and targets. A rationale names the target, so it is for training only.
        template: template of a block; `{seen}` becomes the words of the recent items, oldest
            first, and `{next}` that of the target.
        recent: number of history items that a block names.

    Raises:
        DataError: the template has other placeholders than those two.
    """
    try:
        template.format(seen="", next="")
    except (IndexError, KeyError, ValueError) as error:
        raise DataError(
            f"data.rationale_template = {template!r} has placeholders other than {{seen}} and "
            f"{{next}} ({type(error).__name__}: {error}); use those two"
        ) from error
    word_of_code, codes = code_words(catalog), catalog.codes
    result: list[RationaleBlocks] = []
    bounds = zip(split.history_start[:-1], split.history_start[1:], split.target, strict=True)
    for low, high, target in bounds:
        seen = split.history[max(low, high - recent) : high]
        result.append(
            [
                _fill(
                    template,
                    [word_of_code[level][codes[item, level]] for item in seen],
                    word_of_code[level][codes[target, level]],
                )
                for level in range(codes.shape[1])
            ]
        )
    return result


def _fill(template: str, seen: Sequence[str], next_word: str) -> Block:
    """Fill the template of a block; the result has parts where a word is a `CodeToken`."""
    if not any(isinstance(word, CodeToken) for word in (*seen, next_word)):
        return template.format(seen=" ".join(seen), next=next_word)
    spaced = [part for word in seen for part in (word, " ")][:-1]
    parts: list[str] = []
    for literal, field, _, _ in Formatter().parse(template):
        parts += [literal, *({"seen": spaced, "next": [next_word]}[field] if field else [])]
    # Neighboring texts are one text, as they are where no code is named by its token.
    result: list[str] = []
    for is_code, group in groupby(parts, key=lambda part: isinstance(part, CodeToken)):
        neighbors = list(group)
        result += neighbors if is_code else filter(None, ["".join(neighbors)])
    return tuple(result)
