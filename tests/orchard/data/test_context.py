"""Context of histories, from the columns of a split to the tokens of prompts."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from learner.batch.sft import pack_sequences
from orchard.context import GAPS, ContextColumn, add_context
from orchard.data.context import columns_of
from orchard.data.histories import history_prompts
from orchard.data.prompts import Split, hide_context, make_prompts, make_windows, read_split
from orchard.errors import ConfigError, DataError
from orchard.policy.item_tokenizer import (
    ItemTokenizer,
    compact_tokenizer,
    make_item_tokenizer,
    read_tokenizer,
)
from orchard.policy.prompt_template import PromptTemplate, fill_template
from orchard.settings import DataConfig
from orchard.testing import tiny_catalog
from orchard.types import PolicyVersion

ITEMS = tiny_catalog(num_items=40)
BEHAVIOR = ContextColumn(name="behavior", per_event=True, values=("buy", "view"))
COUNTRY = ContextColumn(name="country", per_event=False, values=("de", "fr"))
HISTORY = [[1, 2, 3], [9]]
COLUMNS = {
    "history_behavior": [["view", "buy", None], ["return"]],
    "country": ["fr", None],
}


def save(path: Path, history: list[list[int]], target: list[int], **more: object) -> Path:
    columns = {"history": pa.array(history, pa.list_(pa.int32())), "target": target, **more}
    pq.write_table(pa.table(columns), path)
    return path


def reader(*columns: ContextColumn) -> ItemTokenizer:
    tokenizer = compact_tokenizer(ITEMS)
    add_context(tokenizer, columns)
    return make_item_tokenizer(tokenizer, ITEMS)


def codes(tokenizer: ItemTokenizer, item: int) -> list[int]:
    return [int(tokenizer.tokens_at(i)[c]) for i, c in enumerate(ITEMS.codes[item])]


def by_hand(tokenizer: ItemTokenizer, row: list[str], events: list[tuple[int, str]]) -> list[int]:
    """The tokens of a prompt, item by item."""
    named = {
        token: number
        for column, ids in zip(tokenizer.context.columns, tokenizer.context.ids, strict=True)
        for token, number in zip(column.tokens, ids, strict=True)
    }
    tokens = [tokenizer.bos, *(named[token] for token in row)]
    for item, token in events:
        tokens += codes(tokenizer, item) + ([named[token]] if token else [])
    return tokens


@pytest.fixture
def split(tmp_path: Path) -> Split:
    path = save(tmp_path / "a.parquet", HISTORY, [4, 5], **COLUMNS)
    return read_split([path], ITEMS, max_history=2, context=(BEHAVIOR, COUNTRY))


def test_a_prompt_has_the_tokens_of_its_events_after_them_and_those_of_the_row_first(
    split: Split,
) -> None:
    tokenizer = reader(BEHAVIOR, COUNTRY)
    prompts = make_prompts(tokenizer, split, np.array([1, 0]))
    parts = np.split(prompts.token, prompts.token_start[1:-1])
    assert parts[0].tolist() == by_hand(tokenizer, ["<country_?>"], [(9, "<behavior_?>")])
    assert parts[1].tolist() == by_hand(
        tokenizer, ["<country_fr>"], [(2, "<behavior_buy>"), (3, "<behavior_?>")]
    )


def test_values_without_a_token_are_counted_and_read_as_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "a.parquet", HISTORY, [4, 5], **COLUMNS)
    split = read_split([path], ITEMS, max_history=9, context=(BEHAVIOR,))
    assert split.context is not None
    assert split.context.event[:, 0].tolist() == [2, 1, 0, 0]
    assert "1 of 4 values of `behavior` in a.parquet have no token, such as 'return'" in caplog.text


def test_a_policy_without_context_passes_over_that_of_the_rows(split: Split) -> None:
    plain, rows = reader(), np.arange(2)
    with_it = make_prompts(plain, split, rows)
    without = make_prompts(plain, replace(split, context=None), rows)
    assert with_it.token.tolist() == without.token.tolist()


def test_rows_without_context_read_as_unknown_to_a_policy_with_it(split: Split) -> None:
    tokenizer = reader(BEHAVIOR, COUNTRY)
    bare = make_prompts(tokenizer, replace(split, context=None), np.array([1]))
    assert bare.token.tolist() == by_hand(tokenizer, ["<country_?>"], [(9, "<behavior_?>")])


def test_windows_predict_each_item_right_after_the_context_of_the_one_before(
    tmp_path: Path,
) -> None:
    tokenizer = reader(BEHAVIOR, COUNTRY)
    path = save(
        tmp_path / "a.parquet", [[1], [1, 2]], [2, 3], user_id=[7, 7], country=["de", "de"],
        history_behavior=[["buy"], ["buy", "view"]],
    )  # fmt: skip
    split = read_split([path], ITEMS, max_history=5, context=(BEHAVIOR, COUNTRY))
    windows = make_windows(split, max_history=5)
    assert windows.item.tolist() == [1, 2, 3]
    version = PolicyVersion(step=0, digest="")
    batch = pack_sequences(windows, np.array([0]), tokenizer, version, forced=True)
    expected = by_hand(
        tokenizer, ["<country_de>"], [(1, "<behavior_buy>"), (2, "<behavior_view>"), (3, "")]
    )
    assert batch.token[0].tolist() == expected
    # Every code is predicted by the slot before it, and no token of context is predicted.
    level_tokens = {t for item in (1, 2, 3) for t in codes(tokenizer, item)}
    slots = [i - 1 for i, token in enumerate(expected) if token in level_tokens]
    assert batch.query_slot.tolist() == slots


def test_the_oldest_items_give_way_with_their_context() -> None:
    context = np.array([[7], [8], [-1]], np.int32), np.array([[5]], np.int32)
    tokens = np.arange(20, 26, dtype=np.int32), np.array([0, 2, 4, 6])
    frame = PromptTemplate(before=(1,), between=(2,), after=(3,), limit=10)
    items, start = np.array([0, 1, 2]), np.array([0, 3])
    token, _ = fill_template(frame, tokens, items, start, context)
    assert token.tolist() == [1, 5, 22, 23, 8, 2, 24, 25, 3]
    longer = replace(frame, limit=13)
    token, _ = fill_template(longer, tokens, items, start, context)
    assert token.tolist() == [1, 5, 20, 21, 7, 2, 22, 23, 8, 2, 24, 25, 3]


def test_requests_give_context_by_name_and_items_that_are_passed_over_lose_theirs() -> None:
    tokenizer = reader(BEHAVIOR, COUNTRY)
    given = {"behavior": ["buy", "view", "wish"], "country": "de"}
    prompts, unknown = history_prompts(tokenizer, [[1, 999, 3], []], contexts=[given, None])
    assert unknown == [1, 0]
    parts = np.split(prompts.token, prompts.token_start[1:-1])
    assert parts[0].tolist() == by_hand(
        tokenizer, ["<country_de>"], [(1, "<behavior_buy>"), (3, "<behavior_?>")]
    )
    assert parts[1].tolist() == by_hand(tokenizer, ["<country_?>"], [])


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"behaviour": ["buy"]}, "context.unknown_column", "reads no context 'behaviour'"),
        ({"behavior": ["buy", "buy"]}, "context.wrong_length", "a list of 1 values"),
        ({"behavior": "buy"}, "context.wrong_length", "a list of 1 values"),
        ({"country": ["de"]}, "context.wrong_length", "must be one value"),
    ],
)
def test_context_that_does_not_fit_is_refused(
    given: dict[str, list[str]], code: str, said: str
) -> None:
    with pytest.raises(DataError, match=said) as refused:
        history_prompts(reader(BEHAVIOR, COUNTRY), [[1]], contexts=[given])
    assert refused.value.code == code


def test_gaps_are_the_times_until_the_next_event_whatever_their_unit(tmp_path: Path) -> None:
    gap = ContextColumn(name="gap", per_event=True, values=GAPS)
    first = 1_600_000_000
    times = [[first, first + 30, first + 30 + 86_400], [None]]
    for unit in (1, 1000):
        path = save(
            tmp_path / f"{unit}.parquet", HISTORY, [4, 5],
            history_timestamp=[[t and t * unit for t in row] for row in times],
            timestamp=[(first + 86_430 + 3_000_000) * unit, first * unit],
        )  # fmt: skip
        split = read_split([path], ITEMS, max_history=9, context=(gap,))
        assert split.context is not None
        named = ["?", *GAPS]
        found = [named[number] for number in split.context.event[:, 0]]
        assert found == ["minute", "week", "quarter", "?"]
    assert gap.number(86_400) == gap.number("week")
    assert gap.number(None) == 0


def test_the_unit_of_typed_times_is_that_of_their_type(tmp_path: Path) -> None:
    gap = ContextColumn(name="gap", per_event=True, values=GAPS)
    times = [datetime(1970, 1, 2, 0, 0), datetime(1970, 1, 2, 0, 10), datetime(1970, 1, 4)]
    path = save(
        tmp_path / "typed.parquet", HISTORY, [4, 5], history_timestamp=[times, [None]],
        timestamp=[datetime(1970, 1, 5), None],
    )  # fmt: skip
    split = read_split([path], ITEMS, max_history=9, context=(gap,))
    assert split.context is not None
    named = ["?", *GAPS]
    assert [named[n] for n in split.context.event[:, 0]] == ["hour", "week", "week", "?"]


def test_the_training_rows_say_which_values_have_tokens(tmp_path: Path) -> None:
    save(
        tmp_path / "train.parquet", HISTORY, [4, 5], history_rating=[[5, 4, None], [1]], age=[30, 7]
    )
    settings = DataConfig(path=tmp_path, context=("rating", "age"))
    rating, age = columns_of(settings, None, may_add=True)
    assert (rating.per_event, rating.values) == (True, ("1", "4", "5"))
    assert (age.per_event, age.values) == (False, ("30", "7"))
    assert (rating.number(5), rating.number(5.0), rating.number("3")) == (3, 3, 0)
    with pytest.raises(DataError, match="no `color`") as refused:
        columns_of(settings.model_copy(update={"context": ("color",)}), None, may_add=True)
    assert refused.value.code == "data.no_column"


def test_lists_of_another_length_than_the_history_are_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.parquet", HISTORY, [4, 5], history_behavior=[["buy"] * 3, ["buy"] * 2]
    )
    with pytest.raises(DataError, match="row 1 of a.parquet has 2 values") as refused:
        read_split([path], ITEMS, max_history=9, context=(BEHAVIOR,))
    assert refused.value.code == "data.context_length"


def test_a_policy_keeps_its_columns_and_refuses_other_ones(tmp_path: Path) -> None:
    tokenizer = compact_tokenizer(ITEMS)
    add_context(tokenizer, (BEHAVIOR, COUNTRY))
    tokenizer.save_pretrained(tmp_path)
    saved = read_tokenizer(tmp_path)
    again = make_item_tokenizer(saved, ITEMS)
    assert again.context == reader(BEHAVIOR, COUNTRY).context
    assert again.size == reader().size + 6
    data = DataConfig(path=tmp_path, context=("behavior", "country"))
    assert columns_of(data, saved, may_add=False) == (BEHAVIOR, COUNTRY)
    for other in ((), ("country",)):
        with pytest.raises(ConfigError, match="trained with") as refused:
            columns_of(data.model_copy(update={"context": other}), saved, may_add=True)
        assert refused.value.code == "config.other_context"
    with pytest.raises(ConfigError, match="no tokens for any context") as refused:
        columns_of(data, compact_tokenizer(ITEMS), may_add=False)
    assert refused.value.code == "config.no_context"


def test_hidden_rows_read_as_unknown_and_the_others_stay(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.parquet", [[1, 2]] * 400, [3] * 400, history_behavior=[["buy", "view"]] * 400
    )
    split = read_split([path], ITEMS, max_history=9, context=(BEHAVIOR,))
    hidden = hide_context(split, 0.25, seed=1)
    assert hidden.context is not None
    event = hidden.context.event.reshape(400, 2)
    is_hidden = (event == 0).all(1)
    assert 60 < is_hidden.sum() < 140
    assert (event[~is_hidden] == [1, 2]).all()
    assert hide_context(split, 0.0, seed=1) is split
