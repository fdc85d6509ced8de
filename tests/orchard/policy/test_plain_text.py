"""Text of users is text, whatever names of tokens it contains and however they were added."""

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orchard.data.rationales import text_tokenizer
from orchard.policy.plain_text import encode_texts, reserved_tokens
from orchard.policy.titles import make_title_tokenizer
from orchard.testing import tiny_catalog, tiny_text_tokenizer

HOSTILE = [
    "<|end|>", "<a_1>", "a<a_1>b", "<pad>", "x <eos> y <eos>", "<think></think>", "<|im_end|>",
    "\uff1cpad\uff1e", "pen", "", "[PAD]",
]  # fmt: skip


def byte_level() -> PreTrainedTokenizerBase:
    return text_tokenizer(tiny_catalog(), ["red pen"], size=300)


def added_late() -> PreTrainedTokenizerBase:
    """Tokens added as published policies add them: declared special or not, normalized or not."""
    tokenizer = make_title_tokenizer(["red pen"], 300)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([f"<a_{code}>" for code in range(3)])
    tokenizer.add_tokens(["<think>", "</think>", "[PAD]"])
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True, normalized=True)])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    return tokenizer


def unigram() -> PreTrainedTokenizerBase:
    """A vocabulary that contains the special tokens as pieces, as SentencePiece models do."""
    pieces = [("<unk>", 0.0), ("<pad>", 0.0), ("<eos>", 0.0), ("<a_1>", 0.0)]
    pieces += [(letter, -2.0) for letter in "abcdeinopstx<>|_/ []1PAD"]
    inner = Tokenizer(Unigram(pieces, unk_id=0))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def words() -> PreTrainedTokenizerBase:
    return tiny_text_tokenizer(tiny_catalog())


@pytest.mark.parametrize("make", [byte_level, added_late, unigram, words])
def test_no_text_becomes_a_special_token(make: Callable[[], PreTrainedTokenizerBase]) -> None:
    tokenizer = make()
    reserved = reserved_tokens(tokenizer)
    assert reserved
    rows = encode_texts(tokenizer, HOSTILE)
    for text, row in zip(HOSTILE, rows, strict=True):
        assert reserved.keys().isdisjoint(row), text
        assert make is words or bool(row) == bool(text)  # its words are few, and none is unknown


@pytest.mark.parametrize("make", [byte_level, added_late])
def test_text_is_kept(make: Callable[[], PreTrainedTokenizerBase]) -> None:
    tokenizer = make()
    for text, row in zip(HOSTILE, encode_texts(tokenizer, HOSTILE), strict=True):
        assert tokenizer.decode(row) in {text, text.replace("\uff1c", "<").replace("\uff1e", ">")}


def test_other_texts_and_added_words_are_encoded_as_ever() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["penholder"])
    texts = ["red pen", "a penholder", "5 < 6 > 4"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert encode_texts(tokenizer, texts) == expected
    word = tokenizer.get_vocab()["penholder"]
    assert encode_texts(tokenizer, ["a penholder <pad>"])[0][2] == word
    assert encode_texts(tokenizer, []) == []
