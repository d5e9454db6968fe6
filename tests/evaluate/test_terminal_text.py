import pytest

from rag_retrieval.evaluate.terminal_text import pad, shorten, width


@pytest.mark.parametrize(("text", "columns"), [("abc", 3), ("北京", 4), ("a北，", 5), ("e\u0301", 1), ("", 0)])
def test_wide_characters_take_two_columns_and_combining_ones_none(text, columns):
    assert width(text) == columns


def test_a_text_is_cut_by_columns_and_never_through_a_wide_character():
    assert shorten("北京是中国的首都", 10) == "北京是..."  # three characters of two, and three dots: 9 of 10
    assert shorten("北京是中国", 10) == "北京是中国"
    assert shorten("one two\n three", 20) == "one two three"
    assert shorten("one two three", 9) == "one tw..."
    assert shorten("one two three", 7) == "one..."


def test_padding_counts_columns():
    assert pad("北京", 6) == "北京  " and pad("toolong", 3) == "toolong"
