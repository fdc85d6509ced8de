"""Titles as items: one slice of tokens, ends where needed, leaves shared by equal titles."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orchard.catalog.catalog import load, write
from orchard.errors import CatalogError
from orchard.policy.item_tokenizer import compact_tokenizer, make_item_tokenizer, read_tokenizer
from orchard.policy.titles import from_titles, make_title_tokenizer, read, read_titles
from orchard.testing import tiny_catalog, tiny_title_tokenizer

TITLES = ["red pen", "red", "blue pen", "red pen", "red pencil"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_title_tokenizer()


def test_every_leaf_reads_as_a_title(tokenizer: PreTrainedTokenizerBase) -> None:
    found = from_titles(TITLES, tokenizer)
    vocabulary = make_item_tokenizer(tokenizer, found)
    read: list[str] = []
    for path in found.trie.path(found.trie.leaf_node):
        tokens = vocabulary.token_of(path[path >= 0])
        read.append(str(tokenizer.decode(tokens)).replace(" ", ""))
    assert sorted(read) == ["bluepen<eos>", "red<eos>", "redpen<eos>", "redpencil<eos>"]


def test_equal_titles_share_a_leaf_and_a_title_within_another_has_its_own(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    leaf = from_titles(TITLES, tokenizer).leaf_of_item.tolist()
    assert leaf[0] == leaf[3]
    assert len(set(leaf)) == 4


def test_all_levels_share_one_slice_of_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    found = from_titles(TITLES, tokenizer)
    vocabulary = make_item_tokenizer(tokenizer, found)
    letters = sorted(set("".join(TITLES)))
    assert len(vocabulary.level_tokens) == 1
    assert vocabulary.tokens_at(0).tolist() == vocabulary.tokens_at(9).tolist()
    assert set(vocabulary.tokens_at(0).tolist()) == {
        *tokenizer.convert_tokens_to_ids(letters), tokenizer.eos_token_id,
    }  # fmt: skip
    assert set(found.level_size) == {len(letters) + 1}
    nodes = torch.arange(1, found.trie.num_nodes)
    depth_two = nodes[found.trie.depth_of(nodes) == 2]
    both = [vocabulary.token_of(n) for n in (depth_two, nodes)]
    assert tokenizer.convert_ids_to_tokens(both[0].tolist()) == ["l", "e"]


def test_a_saved_title_catalog_comes_back_whole(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for titles in (TITLES, ["abc"], ["ab", "cd"]):
        saved = from_titles(titles, tokenizer, item_id=np.arange(len(titles)) + 7)
        write(saved, tmp_path)
        found = load(tmp_path)
        assert found.digest == saved.digest
        assert found.title == tuple(titles)
        assert found.code_token == saved.code_token
        assert found.level_size == saved.level_size
        assert found.end_code == saved.end_code
        assert np.array_equal(found.codes, saved.codes)


def test_a_digest_names_the_tokens_of_titles(tokenizer: PreTrainedTokenizerBase) -> None:
    same = from_titles(["ab"], tokenizer).digest
    assert same == from_titles(["ab"], tokenizer).digest
    assert same != from_titles(["ac"], tokenizer).digest


def test_a_tokenizer_is_made_from_titles_and_writes_every_one_of_them() -> None:
    made = make_title_tokenizer([*TITLES, "Größe 7\N{MULTIPLICATION SIGN}9 \N{SNOWMAN}"], 300)
    again = make_title_tokenizer([*TITLES, "Größe 7\N{MULTIPLICATION SIGN}9 \N{SNOWMAN}"], 300)
    assert made.get_vocab() == again.get_vocab()
    assert 259 < len(made) <= 300
    titles = [*TITLES, "never seen: \N{EURO SIGN}", "Größe 7\N{MULTIPLICATION SIGN}9 \N{SNOWMAN}"]
    found = from_titles(titles, made)
    vocabulary = make_item_tokenizer(made, found)
    path = found.trie.path(found.trie.leaf_node)
    read = [made.decode(vocabulary.token_of(row[row >= 0])[:-1]) for row in path]
    assert sorted(read) == sorted(set(titles))
    assert vocabulary.size == len(made)
    # "red" begins "red pen", and both begin "red pencil": each ends in a leaf of its own.
    assert len(read) == 6


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(CatalogError, match=r"258 tokens has no room .* data.title_tokens"):
        make_title_tokenizer(TITLES, 258)


def test_an_empty_title_is_refused_under_a_tokenizer_of_titles(tmp_path: Path) -> None:
    table = pa.table({"item_id": [4, 7], "title": ["red pen", None]})
    pq.write_table(table, tmp_path / "items.parquet")
    made = make_title_tokenizer(read_titles(tmp_path / "items.parquet"), 260)
    with pytest.raises(CatalogError, match=r"title '' of item 7 has no tokens.*1 of 2 items"):
        read(tmp_path / "items.parquet", made)


@pytest.mark.slow
def test_real_titles_with_equal_ones_and_beginnings_of_others_become_leaves(
    shared_data: Path,
) -> None:
    items = shared_data / "amazon_industrial" / "items.parquet"
    titles = read_titles(items)
    found = read(items, make_title_tokenizer(titles, 4000))
    assert found.trie.num_leaves == len(set(titles)) == 3646
    by_title = {title: int(leaf) for title, leaf in zip(titles, found.leaf_of_item, strict=True)}
    assert [by_title[title] for title in titles] == found.leaf_of_item.tolist()
    assert len(set(by_title.values())) == 3646


def test_a_title_without_tokens_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CatalogError, match=r"title '' of item 9 has no tokens.*1 of 2 items"):
        from_titles(["a", ""], tokenizer, item_id=np.array([5, 9]))


def test_the_name_of_the_end_marker_within_a_title_is_text() -> None:
    title = ["red pen", "red<eos>pen", "<pad>", "pen <a_1> <|end|>"]
    tokenizer = make_title_tokenizer(title, 300)
    found = from_titles(title, tokenizer)
    codes = [row[row >= 0] for row in found.codes]
    end = found.code_token.index(tokenizer.eos_token_id)
    assert [row.tolist().count(end) for row in codes] == [1, 1, 1, 1]
    assert all(int(row[-1]) == end for row in codes)
    tokens = [[found.code_token[code] for code in row[:-1]] for row in codes]
    assert [tokenizer.decode(row) for row in tokens] == title


def test_unknown_words_that_become_the_end_marker_are_refused() -> None:
    inner = Tokenizer(WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    inner.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<eos>"
    )
    with pytest.raises(CatalogError, match=r"of item 1 has words .* as the end marker <eos>"):
        from_titles(["a", "ab"], tokenizer)


def test_no_titles_are_no_catalog(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CatalogError, match="no items"):
        from_titles([], tokenizer)


def test_titles_need_a_token_that_ends_them(tokenizer: PreTrainedTokenizerBase) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(CatalogError, match="no eos_token"):
        from_titles(TITLES, endless)


def test_titles_of_another_tokenizer_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    other = compact_tokenizer(tiny_catalog())
    with pytest.raises(CatalogError, match="with the policy's own tokenizer"):
        make_item_tokenizer(other, from_titles(TITLES, tokenizer))


def test_a_title_catalog_is_read_with_the_tokenizer_of_a_saved_policy(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = read_tokenizer(tmp_path)
    assert from_titles(TITLES, again).digest == from_titles(TITLES, tokenizer).digest
