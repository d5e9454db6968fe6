"""Of the data of a run, the lengths of its pairs. Whole runs are in test_mixed_runs."""

import numpy as np
from training_runs import write_jsonl

from rag_retrieval.data.store import open_store
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.train import run_data
from rag_retrieval.train.reranker.run import RerankerTraining


def test_the_sampled_pairs_are_spread_evenly_over_the_data(tmp_path, bert, monkeypatch):
    lines = [{"query": "rain", "content": "a " * (place + 1), "label": 1} for place in range(9)]
    store = open_store(write_jsonl(tmp_path / "a.jsonl", lines), cache_dir=tmp_path)
    scorer, training = CrossEncoder.from_pretrained(bert, num_labels=1, max_length=16), RerankerTraining(config=None)
    ((_, lengths, limit, sampled),) = training.token_lengths(store, scorer)
    assert not sampled and limit == 16 and np.diff(lengths).tolist() == [1] * 8
    monkeypatch.setattr(run_data, "sample_size", lambda pairs, size: 3)
    ((_, some, _, sampled),) = training.token_lengths(store, scorer)
    assert sampled and some.tolist() == lengths[[0, 4, 8]].tolist()
