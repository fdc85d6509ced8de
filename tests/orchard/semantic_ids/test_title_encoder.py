"""Words and characters of titles."""

from orchard.semantic_ids import title_encoder


def test_words_are_read_as_before_where_every_title_shares_one() -> None:
    assert title_encoder.tokens("oak-table no. 5") == ["oak", "table", "no", "5"]
    assert title_encoder.tokens("Sony赤の椅子 x") == ["Sony", "赤の", "の椅", "椅子", "x"]
