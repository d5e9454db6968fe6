import sys
from pathlib import Path

import pytest

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mine_memory

from rag_retrieval.data.readers import row_objects


def test_documents_are_the_same_again_and_as_long_as_asked():
    texts = list(mine_memory.random_texts(2500, 20))
    assert texts == list(mine_memory.random_texts(2500, 20))
    lengths = [len(text) for text in texts]
    assert len(texts) == 2500 and min(lengths) >= 10 and max(lengths) < 30 and 19 < sum(lengths) / 2500 < 20


@pytest.mark.slow
@pytest.mark.parametrize("way", mine_memory.WAYS)
def test_every_way_is_measured(tmp_path, way):
    mine_memory.write_data(tmp_path / "data", size=300, num_queries=10, words=20)
    assert sum(1 for _ in row_objects(tmp_path / "data" / "queries.jsonl")) == 10
    mine_memory.write_encoder(tmp_path / "encoder")
    seconds, cpu, rss, private = mine_memory.measure(way, tmp_path / "data", tmp_path / "encoder")
    assert seconds > 0 and cpu > 0 and rss > private > 10
