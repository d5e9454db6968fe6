"""Lines that fit a terminal, in any language."""

import pytest
from rich.cells import cell_len

from rag_retrieval.core.terminal import rendered, wrapped


def test_a_line_of_text_is_never_broken():
    assert rendered(["x" * 200, "runs/a b/" + "y" * 100], 80).splitlines() == ["x" * 200, "runs/a b/" + "y" * 100]


def test_a_text_is_wrapped_between_words_and_by_columns():
    assert wrapped("one two\n three", 8) == ["one two", "three"]
    assert wrapped("水在一百度沸腾", 6) == ["水在一", "百度沸", "腾"]
    assert wrapped("", 8) == [""]


@pytest.mark.parametrize("columns", [7, 8, 20])
def test_a_text_of_too_many_lines_ends_in_an_ellipsis_within_the_columns(columns):
    for text in ("one two three four five six seven", "水在一百度沸腾，" * 5, "x" * 99):
        lines = wrapped(text, columns, 2) if columns < 20 else wrapped(text, columns, 1)
        assert lines[-1].endswith("…") and max(map(cell_len, lines)) <= columns
    assert wrapped("one two", 7, 1) == ["one two"]
