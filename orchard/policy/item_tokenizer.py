"""Tokenize items: the catalog, the token of each code and the prompt template.

Compact policies have a word-level tokenizer with one token per code; text policies have the code
tokens in addition to their text tokens. The codes of title catalogs are text tokens at all levels.

Shapes:  V codes of one level   F nodes   I items   T tokens   R rows (R1 = R + 1)
         H history items   E, U tokens of context of an event and of a row
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import Trie
from orchard.context import Context, ContextTokens, context_tokens
from orchard.errors import CatalogError, DataError
from orchard.policy import prompt_template
from orchard.policy.code_tokens import PUBLISHED, find_spelling
from orchard.policy.prompt_template import PromptTemplate, fill_template

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
THINK, THOUGHT = "<think>", "</think>"


def sid_token(level: int, code: int) -> str:
    """Return the token of a code, as in published data sets: `<a_5>` is code 5 of level 0."""
    return PUBLISHED.token(level, code)


@dataclass(frozen=True, kw_only=True)
class ThinkTokens:
    """Token IDs that delimit the thinking blocks in the text of a policy."""

    open: int
    """Opening tag of a block."""
    close: int
    """Closing tag of a block."""
    end: int
    """End-of-text token; a policy that generates it within a block has stopped too early."""


@dataclass(frozen=True, kw_only=True)
class ItemTokenizer:
    """A catalog with the tokens of its codes: items to tokens, trie nodes to tokens, prompts.

    In title mode all levels share one slice of token ids.
    """

    catalog: Catalog
    level_tokens: tuple[Int[Tensor, " _"], ...]
    """Token id of each code, level by level."""
    bos: int
    pad: int
    size: int
    """Number of token ids, hence of rows of the model's head."""
    think: ThinkTokens | None = None
    """Tags of a policy that reasons before it names an item."""
    instruction: PromptTemplate | None = None
    """Template of a text policy's prompt."""
    context: ContextTokens = field(default_factory=ContextTokens)
    """Context that prompts have beside the items; most policies read none."""

    @property
    def trie(self) -> Trie:
        """The legal code sequences of the catalog."""
        return self.catalog.trie

    @property
    def template(self) -> PromptTemplate:
        """Tokens around the items of a prompt; for a compact policy `<bos>` alone."""
        return self.instruction or PromptTemplate(before=(self.bos,))

    def slice_of(self, level: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Index into `level_tokens` for the codes chosen at each 0-based level."""
        return level.clamp(max=len(self.level_tokens) - 1)

    def tokens_at(self, level: int) -> Int[Tensor, " V"]:
        """Token id of each code of a level."""
        return self.level_tokens[min(level, len(self.level_tokens) - 1)]

    @cached_property
    def _table(self) -> tuple[Int[Tensor, " V"], Int[Tensor, " levels"]]:
        sizes = torch.tensor([0, *(len(t) for t in self.level_tokens)])
        return torch.cat(self.level_tokens), sizes.cumsum(0)[:-1]

    def token_of(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Token id of the code that leads into each trie node (none of them the root)."""
        table, first = self._table
        level = self.slice_of(self.trie.depth_of(node) - 1)
        return table.to(node.device)[first.to(node.device)[level] + self.trie.code[node]]

    @cached_property
    def item_tokens(self) -> tuple[Int32[np.ndarray, " T"], Int64[np.ndarray, " I1"]]:
        """Tokens of every item of the catalog, ragged."""
        codes = self.catalog.codes
        table = np.full(codes.shape, -1, dtype=np.int32)
        for level in range(codes.shape[1]):
            present = codes[:, level] >= 0
            tokens = self.tokens_at(level).cpu().numpy()
            table[present, level] = tokens[codes[present, level]]
        return table[table >= 0], ragged.starts((table >= 0).sum(1))

    def encode_history(
        self,
        item: Int64[np.ndarray, " H"],
        start: Int64[np.ndarray, " R1"],
        context: Context | None = None,
    ) -> tuple[Int32[np.ndarray, " T"], Int64[np.ndarray, " R1"]]:
        """Tokens of a prompt for each row of items; the oldest items give way where it is full.

        Args:
            item: catalog rows, oldest first.
            start: row r holds the items `start[r] : start[r + 1]`.
            context: context of the items and rows; by default that of unknown values. A policy
                that reads no context passes over it.
        """
        tokens = self.tokens_beside(context, start)
        return fill_template(self.template, self.item_tokens, item, start, tokens)

    def tokens_beside(
        self, context: Context | None, start: Int64[np.ndarray, " R1"]
    ) -> tuple[Int32[np.ndarray, "H E"], Int32[np.ndarray, "R U"]] | None:
        """Tokens of a context as `fill_template` takes them; None for a policy that reads none."""
        if not self.context.columns:
            return None
        return self.context.of(context, num_items=int(start[-1]), num_rows=len(start) - 1)

    def with_catalog(self, catalog: Catalog) -> "ItemTokenizer":
        """The same tokens for another version of the catalog."""
        return replace(self, catalog=catalog)

    def to(self, device: torch.device | str) -> "ItemTokenizer":
        """The same tokenizer with trie and token table on another device."""
        return replace(
            self,
            catalog=replace(self.catalog, trie=self.trie.to(device)),
            level_tokens=tuple(tokens.to(device) for tokens in self.level_tokens),
        )


def compact_tokenizer(catalog: Catalog) -> PreTrainedTokenizerFast:
    """Create a word-level tokenizer with the special tokens and one token per code.

    Raises:
        CatalogError: the catalog has more levels than there are names, or is a title catalog.
    """
    if catalog.code_token:
        raise CatalogError(
            "a catalog of titles has a tokenizer, the one that made it; use that instead"
        )
    if len(catalog.level_size) > 26:
        raise CatalogError(
            f"semantic IDs have {len(catalog.level_size)} levels; compact policies name up to 26"
        )
    tokens = [PAD, BOS, EOS]
    for level, size in enumerate(catalog.level_size):
        tokens += [sid_token(level, code) for code in range(size)]
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=PAD))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a policy folder; raises DataError if there is none to load."""
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder} holds no tokenizer.json; it is not a saved policy")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the libraries raise arbitrary exceptions for broken files
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{folder} holds no loadable tokenizer: {reason}; save it again", code="policy.damaged"
        ) from error


def think_tokens(tokenizer: PreTrainedTokenizerBase) -> ThinkTokens:
    """Look up the tags of thinking blocks; each must be a single token.

    Raises:
        DataError: a tag is missing or is split into several tokens, or there is no `eos_token`.
    """
    vocabulary, tag_ids = tokenizer.get_vocab(), list[int]()
    for tag in (THINK, THOUGHT):
        pieces: list[int] = tokenizer.encode(tag, add_special_tokens=False)
        if pieces != [vocabulary.get(tag)]:
            raise DataError(
                f"the policy's tokenizer reads {tag} as {len(pieces)} tokens"
                f"{'' if tag in vocabulary else ' and has none for it'}; thinking needs a token "
                "for it: add one to the tokenizer as a special token and warm-start the policy "
                "with it"
            )
        tag_ids += pieces
    end = cast(int | None, tokenizer.eos_token_id)
    if end is None:
        raise DataError("the policy's tokenizer has no eos_token, which ends a text; give it one")
    return ThinkTokens(open=tag_ids[0], close=tag_ids[1], end=end)


def make_item_tokenizer(tokenizer: PreTrainedTokenizerBase, catalog: Catalog) -> ItemTokenizer:
    """Create the item tokenizer of a catalog from the code tokens of a tokenizer.

    Codes may have any spelling that `code_tokens.find_spelling` finds.

    Raises:
        CatalogError: a code has no token, for example because the policy belongs to another
            catalog, or codes have tokens in several spellings.
    """
    vocabulary = tokenizer.get_vocab()
    if catalog.code_token:
        return _title_item_tokenizer(tokenizer, vocabulary, catalog)
    spelling = find_spelling(vocabulary, catalog.level_size)
    levels: list[Tensor] = []
    for level, size in enumerate(catalog.level_size):
        tokens = [spelling.token(level, code) for code in range(size)]
        missing = [token for token in tokens if token not in vocabulary]
        if missing:
            raise CatalogError(
                f"the policy's tokenizer has no token {missing[0]} ({len(missing)} of {size} codes "
                f"of level {level + 1} are missing); it was made for another catalog"
            )
        levels.append(torch.tensor([vocabulary[token] for token in tokens]))
    return _with_specials(tokenizer, vocabulary, catalog, tuple(levels))


def _title_item_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int], catalog: Catalog
) -> ItemTokenizer:
    """Create the item tokenizer of a title catalog, whose levels share one slice of token IDs.

    Raises:
        CatalogError: the titles were tokenized with another tokenizer.
    """
    token = torch.tensor(catalog.code_token)
    if int(token.max()) >= len(tokenizer) or int(token[-1]) != tokenizer.eos_token_id:
        raise CatalogError(
            f"the titles end with token {int(token[-1])} and use tokens up to {int(token.max())}, "
            f"the policy's tokenizer ends with {tokenizer.eos_token_id} and has {len(tokenizer)}; "
            "tokenize the titles with the policy's own tokenizer"
        )
    return _with_specials(tokenizer, vocabulary, catalog, (token,))


def _with_specials(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: dict[str, int],
    catalog: Catalog,
    levels: tuple[Tensor, ...],
) -> ItemTokenizer:
    """Create the item tokenizer from the code tokens and the special tokens of a tokenizer."""
    pad = vocabulary.get(str(tokenizer.pad_token), 0)
    bos = vocabulary.get(str(tokenizer.bos_token), pad)
    return ItemTokenizer(
        catalog=catalog,
        level_tokens=levels,
        bos=bos,
        pad=pad,
        size=len(tokenizer),
        instruction=prompt_template.load_from_tokenizer(tokenizer),
        context=context_tokens(tokenizer),
    )
