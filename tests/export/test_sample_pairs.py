"""The pairs that come with the program reach from one token to beyond the limit of any model."""

import pytest

from rag_retrieval.export.sample_pairs import sample_pairs


@pytest.mark.parametrize(("family", "max_length"), [("bert", 512), ("bert", 16), ("xlm_roberta", 100), ("llama", 300)])
def test_lengths_go_from_the_shortest_to_the_limit_in_small_steps(load_tiny, family, max_length):
    encoder = load_tiny(family, max_length=max_length).pair_encoder
    encoded = encoder.encode(sample_pairs(encoder))
    documents = [len(pair) - pair.document_start - len(encoder.template.suffix) for pair in encoded]
    one_letter = len(encoder.document_ids(["b"])[0])  # with what a decoder's format puts around it
    assert min(documents) == one_letter and max(map(len, encoded)) == max_length
    assert any(pair.truncated for pair in encoded) and not all(pair.truncated for pair in encoded)
    lengths = sorted(set(documents))
    assert all(after <= 2.2 * before + 3 for before, after in zip(lengths, lengths[1:], strict=False)), lengths


def test_there_are_english_and_chinese_texts_and_an_empty_query(load_tiny):
    pairs = sample_pairs(load_tiny("bert").pair_encoder)
    for words in ("file", "文件"):
        assert any(words in query for query, _ in pairs) and any(words in document for _, document in pairs)
    assert any(not query for query, _ in pairs) and len(set(pairs)) == len(pairs) > 20
