"""The data of a run: names, checks and what the log tells of them. Whole runs are in test_mixed_runs."""

import numpy as np
from training_runs import write_jsonl

from rag_retrieval.data.store import open_store
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.train.reranker import run_data
from rag_retrieval.train.reranker.run_data import distinct_names, sample_size, token_lengths


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


def test_the_sampled_pairs_are_spread_evenly_over_the_data(tmp_path, bert, monkeypatch):
    lines = [{"query": "rain", "content": "a " * (place + 1), "label": 1} for place in range(9)]
    store = open_store(write_jsonl(tmp_path / "a.jsonl", lines), cache_dir=tmp_path)
    scorer = CrossEncoder.from_pretrained(bert, num_labels=1, max_length=16)
    lengths, sampled = token_lengths(store, scorer)
    assert not sampled and np.diff(lengths).tolist() == [1] * 8
    monkeypatch.setattr(run_data, "sample_size", lambda pairs, size: 3)
    some, sampled = token_lengths(store, scorer)
    assert sampled and some.tolist() == lengths[[0, 4, 8]].tolist()


def test_files_have_their_last_path_part_as_name_numbered_where_it_repeats():
    assert distinct_names(["x/a.jsonl", "owner/set"]) == ["a.jsonl", "set"]
    assert distinct_names(["x/a.jsonl", "b.jsonl", "y/a.jsonl"]) == ["1-a.jsonl", "b.jsonl", "3-a.jsonl"]
