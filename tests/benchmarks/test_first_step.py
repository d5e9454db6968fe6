import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_bert

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import first_step

from rag_retrieval.data.store import open_store


def test_pairs_are_reproducible_five_for_a_query_with_one_relevant(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path in paths:
        first_step.write_pairs(path, 1000, np.random.default_rng(1))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    store = open_store(paths[0], group_by_query=True, cache_dir=tmp_path)
    assert store.group_sizes.tolist() == [5] * 200
    assert store.group(7).labels.tolist() == [1, 0, 0, 0, 0]
    words = [len(store.pair(pair).document.split()) for pair in range(1000)]
    assert 40 < np.median(words) < 50 and max(words) > 100


@pytest.mark.slow
def test_a_start_ends_with_its_first_step_and_all_laps(tmp_path):
    source = tmp_path / "a.jsonl"
    first_step.write_pairs(source, 200, np.random.default_rng(1))
    model = tiny_bert(tmp_path / "base")
    laps, own, worker = first_step.first_step(source, tmp_path / "cache", tmp_path / "run", model)
    assert list(laps) == [*first_step.LAPS, "logged"]
    assert list(laps.values()) == sorted(laps.values())
    assert min(own, worker) > 10 * first_step.MIB
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
