"""What is no list of pairs is refused, with the position of what is wrong."""

import pytest

from rag_retrieval.models.inputs import check_pairs


@pytest.mark.parametrize(
    "pairs,message",
    [
        ("text", "pairs: expected a list, found str"),
        (None, "found NoneType"),
        (7, "found int"),
        ({"query": "a", "document": "b"}, "found dict"),
        ({"a", "b"}, "found set"),
        ([["a", "b"], "cd"], r"pairs\[1\] must be \[query, document\], found 'cd'"),
        (["a", "b", "c"], r"pairs\[0\] must be \[query, document\], found 'a'"),
        ([["a", "b"], ["a", "b", "c"]], r"pairs\[1\] must be .* found \['a', 'b', 'c'\]"),
        ([["a", "b"], ["a"]], r"pairs\[1\] must be"),
        ([["a", "b"], None], r"pairs\[1\] must be .* found None"),
        ([["a", "b"], 3], r"pairs\[1\] must be .* found 3"),
        ([["a", "b"], ["a", None]], r"pairs\[1\]: the document must be a string, found NoneType"),
        ([["a", "b"], [5, "b"]], r"pairs\[1\]: the query must be a string, found int"),
        ([["a", b"b"]], r"pairs\[0\]: the document must be a string, found bytes"),
        ([["a", "b"], ["a", "\ud83d"]], r"pairs\[1\]: the document holds half a surrogate pair"),
    ],
)
def test_a_bad_pair_is_named_with_its_position(pairs, message):
    with pytest.raises(ValueError, match=message):
        check_pairs(pairs)
