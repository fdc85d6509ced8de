"""Rationales: made from titles, read from files, cut into blocks, and turned into tokens."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.data import rationales
from orchard.data.prompts import Split
from orchard.errors import DataError
from orchard.policy.item_tokenizer import make_item_tokenizer, sid_token, think_tokens

TEMPLATE = "seen {seen}, next {next}"
WORDS = [["Lamp", "Tent"], ["Oak", "Steel"], ["Slim", "Royal"]]


@pytest.fixture(scope="module")
def items() -> Catalog:
    codes = np.array([(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    titles = [f"{WORDS[2][c]} {WORDS[1][b]} {WORDS[0][a]}" for a, b, c in codes.tolist()]
    return catalogs.from_codes(codes, title=titles)


@pytest.fixture(scope="module")
def split() -> Split:
    return Split(
        user=np.arange(2),
        history=np.array([0, 7, 3, 5, 6]),
        history_start=np.array([0, 4, 5]),
        target=np.array([2, 4]),
    )


def test_words_of_codes_are_those_that_only_their_items_have(items: Catalog) -> None:
    assert rationales.code_words(items) == WORDS


def test_codes_without_titles_are_named_by_their_tokens() -> None:
    bare = catalogs.from_codes([[0, 1], [1, 0]])
    assert rationales.code_words(bare)[1] == [sid_token(1, 0), sid_token(1, 1)]


def test_block_k_names_code_k_of_recent_items_and_of_the_target(
    items: Catalog, split: Split
) -> None:
    first, second = rationales.from_titles(items, split, template=TEMPLATE)
    assert first == [
        "seen Tent Lamp Tent, next Lamp",
        "seen Steel Steel Oak, next Steel",
        "seen Royal Royal Royal, next Slim",
    ]
    assert second[0] == "seen Tent, next Tent"
    with pytest.raises(DataError, match=r"placeholders other than \{seen\} and \{next\}"):
        rationales.from_titles(items, split, template="{user}")


def test_rationales_are_read_as_lists_or_between_tags(tmp_path: Path) -> None:
    lists = pa.array([["a", "b"], ["c", ""]], pa.list_(pa.string()))
    pq.write_table(pa.table({"why": lists}), tmp_path / "lists.parquet")
    texts = ["<think>\na\n</think>\n<think>b</think>", "<think>c</think> <think></think> x"]
    pq.write_table(pa.table({"why": texts}), tmp_path / "texts.parquet")
    for name in ("lists", "texts"):
        found = rationales.read([tmp_path / f"{name}.parquet"], "why", 2)
        assert found == [["a", "b"], ["c", ""]]
    with pytest.raises(DataError, match="no `because`"):
        rationales.read([tmp_path / "texts.parquet"], "because", 2)


@pytest.mark.parametrize(
    ("cell", "count"),
    [("<think>a</think>", 1), ("<think>a</think><think>b", 1), ("a", 0), (None, 0)],
)
def test_a_rationale_with_another_number_of_blocks_is_refused(
    tmp_path: Path, cell: str | None, count: int
) -> None:
    good = "<think>a</think><think>b</think>"
    pq.write_table(pa.table({"why": [good, cell]}), tmp_path / "train.parquet")
    message = f"row 1 of train.parquet has {count} blocks, an item has 2 codes"
    with pytest.raises(DataError, match=message):
        rationales.read([tmp_path / "train.parquet"], "why", 2)


def test_traces_are_the_blocks_between_their_tags(items: Catalog, split: Split) -> None:
    texts = rationales.from_titles(items, split, template=TEMPLATE)
    flat = [block for blocks in texts for block in blocks]
    tokenizer = rationales.text_tokenizer(items, flat, size=300)
    tags = think_tokens(tokenizer)
    assert make_item_tokenizer(tokenizer, items).size == len(tokenizer)
    traces = rationales.tokenize_rationales(texts, tokenizer, cap=40)
    assert len(traces) == 2
    token, start = traces.of(np.array([1, 0]))
    row = token[start[1] : start[2]].tolist()
    parts = "".join(f"<think>{block}</think>" for block in texts[0])
    assert tokenizer.decode(row).replace(" ", "") == parts.replace(" ", "")
    assert row.count(tags.open) == row.count(tags.close) == 3
    again = rationales.text_tokenizer(items, flat, size=300)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_blocks_that_no_rollout_could_write_are_refused(items: Catalog) -> None:
    tokenizer = rationales.text_tokenizer(items, ["abc"], size=256)
    with pytest.raises(DataError, match="more than rollout.think.block_tokens = 20"):
        rationales.tokenize_rationales([["x" * 50, "b", "c"]], tokenizer, cap=20)


def test_names_of_tokens_in_a_block_are_text_and_codes_without_a_title_are_tokens() -> None:
    bare = catalogs.from_codes([[0, 0], [1, 1]], title=["<a_1> </think>", ""])
    rows = Split(
        user=np.array([0]), target=np.array([1]),
        history=np.array([0]), history_start=np.array([0, 1]),
    )  # fmt: skip
    blocks = rationales.from_titles(bare, rows, template="after {seen} comes {next}.")
    tokenizer = rationales.text_tokenizer(bare, ["after comes"], size=300)
    vocabulary, tags = tokenizer.get_vocab(), think_tokens(tokenizer)
    found = rationales.tokenize_rationales(blocks, tokenizer, cap=99)
    for level, (low, high) in enumerate(pairwise(found.token_start.tolist())):
        row = found.token[low:high].tolist()
        assert (row[0], row[-1]) == (tags.open, tags.close)
        named = f"<{'ab'[level]}_1>"
        reserved = [token for token in row[1:-1] if token in tokenizer.added_tokens_decoder]
        assert reserved == [vocabulary[named]]
        word = rationales.code_words(bare)[level][0]
        assert tokenizer.decode(row[1:-1]) == f"after {word} comes {named}."
