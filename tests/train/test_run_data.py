"""What every trainer says of its data. Whole runs are in reranker/test_mixed_runs."""

from rag_retrieval.train.run_data import distinct_names, sample_size


def test_token_lengths_are_counted_on_as_many_pairs_as_take_a_moment():
    cases = [
        (8_400, 1_900_000, 8_400),  # small: all of them
        (1_000_000, 100_000_000, 10_000),  # 100 bytes each
        (1_000_000, 500_000_000, 4_000),  # 500 bytes each: 4,000 have 2 MB
        (1_000_000, 50_000_000_000, 1_000),  # 50 kB each
        (300, 15_000_000, 300),
    ]
    for pairs, size, expected in cases:
        assert sample_size(pairs, size) == expected


def test_files_have_their_last_path_part_as_name_numbered_where_it_repeats():
    assert distinct_names(["x/a.jsonl"]) == [""]
    assert distinct_names(["x/a.jsonl", "owner/set"]) == ["a.jsonl", "set"]
    assert distinct_names(["x/a.jsonl", "b.jsonl", "y/a.jsonl"]) == ["1-a.jsonl", "b.jsonl", "3-a.jsonl"]
