"""Encode text of users, such as titles, as text: no part of it becomes a special token.

A tokenizer turns `<|end|>`, `<a_1>` or `<pad>` within a text into the special token of that name.
That is right for a template, which its author writes for the tokenizer, and wrong for data: a title
that contains the name of a token would end an answer, or name an item.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
"""Added tokens that are no words of a language: special tokens need not be declared as such."""
_CODE = re.compile(r"<[a-z]_\d+>|</?think>")
"""Tokens of codes and tags, which some vocabularies contain without adding them."""


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token IDs of each text, without special tokens, also where it names one.

    A text that names a special token is encoded by a copy of the tokenizer that does not know it,
    and, where the vocabulary itself contains the name, with that name letter by letter.
    """
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    reserved = reserved_tokens(tokenizer)
    unknown = cast(str | None, tokenizer.unk_token)
    named = [
        index
        for index, (text, row) in enumerate(zip(texts, rows, strict=True))
        if not reserved.keys().isdisjoint(row) or (unknown is not None and unknown in text)
    ]
    if named:
        plain = _without(tokenizer, reserved.values())
        for index in named:
            rows[index] = _encode(plain, texts[index], reserved, unknown)
    return rows


def reserved_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that no text may become, by ID; the token for unknown words is none."""
    special = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    special |= {i for i, t in added.items() if t.special or _MARKUP.fullmatch(t.content)}
    special |= {i for token, i in tokenizer.get_vocab().items() if _CODE.fullmatch(token)}
    special.discard(cast(int, tokenizer.unk_token_id))
    return {i: cast(str, tokenizer.convert_ids_to_tokens(i)) for i in sorted(special)}


def _without(tokenizer: PreTrainedTokenizerBase, reserved: Any) -> Tokenizer:
    """Copy the inner tokenizer without its reserved added tokens."""
    backend = cast(Tokenizer, cast(Any, tokenizer).backend_tokenizer)
    tree: dict[str, Any] = json.loads(backend.to_str())
    names = {*reserved, str(tokenizer.unk_token)}
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] not in names]
    tree["truncation"] = tree["padding"] = None
    return Tokenizer.from_str(json.dumps(tree))


def _encode(
    plain: Tokenizer, text: str, reserved: dict[int, str], unknown: str | None
) -> list[int]:
    """Encode a text; where a reserved token still appears, encode the names letter by letter."""
    row: list[int] = plain.encode(text, add_special_tokens=False).ids
    if reserved.keys().isdisjoint(row):
        return row
    names = {*reserved.values()} | ({unknown} if unknown else set[str]())
    found = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    parts: list[str] = []
    end = 0
    for match in found.finditer(text):
        parts += [text[end : match.start()], *match.group()]
        end = match.end()
    pieces = [piece for piece in (*parts, text[end:]) if piece]
    encoded = plain.encode_batch(pieces, add_special_tokens=False)
    return [token for piece in encoded for token in piece.ids if token not in reserved]
