"""Candidates from an index that is there, from all documents at random, and scores of a guide."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mining_samples import animal_data, config_of, read_output, write_beir, write_jsonl
from tiny_models import tiny_bert

from rag_retrieval import Embedder
from rag_retrieval.data.records import DataError
from rag_retrieval.mining.run import mine
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.index import Index, build_index


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return animal_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def index(data, base, tmp_path_factory):
    """Of words and vectors. Read only."""
    folder = tmp_path_factory.mktemp("index") / "index"
    build_index(data, folder, IndexOptions(embedder=base, device="cpu", batch_size=8, normalize=True))
    return folder


def written(config) -> bytes:
    mine(config)
    return Path(config.output).read_bytes()


def lines_of(config) -> list[dict]:
    return [json.loads(line) for line in written(config).splitlines()]


@pytest.mark.parametrize("candidates", ["bm25", "dense", "fused"])
def test_an_index_gives_what_mining_builds_for_itself(data, base, index, tmp_path, candidates):
    options = {"candidates": candidates, "device": "cpu"}
    own = {} if candidates == "bm25" else {"dense_model": base, "dense_batch_size": 8}
    expected = written(config_of(data, tmp_path / "own.jsonl", **options, **own))
    assert written(config_of(data, tmp_path / "index.jsonl", index=str(index), **options)) == expected
    records = [{"query": line["query"], "pos": line["pos"]} for line in read_output(tmp_path / "own.jsonl")]
    source = write_jsonl(tmp_path / "records.jsonl", records)
    assert written(config_of(source, tmp_path / "records.out.jsonl", index=str(index), **options)) == expected
    assert not list(tmp_path.glob("*.work"))


def test_a_search_that_the_index_has_not_is_named_with_those_that_it_has(data, index, tmp_path):
    config = config_of(data, tmp_path / "out.jsonl", index=str(index), candidates="lexical")
    with pytest.raises(ValueError, match="has bm25, dense, fused, random; found lexical"):
        mine(config)
    with pytest.raises(ValueError, match="no finished index"):
        mine(config_of(data, tmp_path / "out.jsonl", index=str(tmp_path)))
    other = write_beir(tmp_path / "other", {"x": "a"}, {"q": "a"}, [("q", "x", 1)])
    with pytest.raises(DataError, match="the corpus has no document 'x'"):
        mine(config_of(other, tmp_path / "out.jsonl", index=str(index)))


def test_kept_parts_are_not_those_of_an_index_that_changed(data, index, tmp_path):
    copied = tmp_path / "index"
    shutil.copytree(index, copied)
    options = {"index": str(copied), "candidates": "bm25", "work_dir": str(tmp_path / "work"), "sampling": "top"}
    before = written(config_of(data, tmp_path / "a.jsonl", **options))
    added = [{"_id": "new", "text": "The panda lives near a waterfall."}]
    Index(copied).add(write_jsonl(tmp_path / "added.jsonl", added))
    after = written(config_of(data, tmp_path / "b.jsonl", **options))
    assert b"waterfall" in after and b"waterfall" not in before


def test_random_negatives_are_any_documents_but_those_that_answer(tmp_path, base):
    """Chinese and English; the query itself, positives, and documents with the text of either stay out."""
    animals = ("熊猫", "老虎", "水獭", "panda", "tiger", "otter")
    documents = {f"d{place}": f"{animals[place % 6]} 住在第 {place} 号" for place in range(60)}
    documents |= {"same": "熊猫  住在第 0 号", "q0": "query document", "asked": "哪里有熊猫"}
    queries = {"q0": "哪里有熊猫", "q1": "where is the tiger"}
    qrels = [("q0", "d0", 1), ("q0", "d6", 2), ("q1", "d4", 1)]
    folder = write_beir(tmp_path / "data", documents, queries, qrels)
    options = {"candidates": "random", "num_negatives": 50, "last_rank": 100}
    lines = lines_of(config_of(folder, tmp_path / "out.jsonl", **options))
    assert [line["query"] for line in lines] == ["where is the tiger", "哪里有熊猫"]
    answers = {documents[name] for name in ("d0", "d6", "same", "q0", "asked")}
    assert len(set(lines[1]["neg"])) == 50 and not answers & set(lines[1]["neg"])
    assert len(set(lines[0]["neg"])) == 50 and documents["d4"] not in lines[0]["neg"]
    assert set(lines[0]["neg"]) != set(lines[1]["neg"])
    build_index(folder, tmp_path / "index", IndexOptions())
    expected = (tmp_path / "out.jsonl").read_bytes()
    assert written(config_of(folder, tmp_path / "b.jsonl", index=str(tmp_path / "index"), **options)) == expected
    assert written(config_of(folder, tmp_path / "c.jsonl", seed=1, **options)) != expected
    ten = lines_of(config_of(folder, tmp_path / "d.jsonl", **options | {"num_negatives": 10}))
    assert [len(line["neg"]) for line in ten] == [10, 10]


def test_a_guide_keeps_negatives_below_95_percent_of_the_lowest_positive(data, base, tmp_path):
    other = tiny_bert(tmp_path / "guide", seed=3)
    options = {"dense_model": base, "candidates": "fused", "last_rank": 36, "num_negatives": 4, "sampling": "top"}
    opened = {"device": "cpu", "max_length": 6}
    config = config_of(data, tmp_path / "out.jsonl", guide=other, relative_margin=0.05, **opened, **options)
    summary = mine(config)
    guide = Embedder(other, **opened)
    kept = {}
    for line in read_output(tmp_path / "out.jsonl"):
        query, positive = guide.encode_queries(line["query"]), guide.encode_documents(line["pos"])
        negatives = guide.encode_documents(line["neg"]) @ query
        np.testing.assert_allclose(line["candidate_scores"]["neg"], negatives, atol=2e-6)
        assert line["candidate_scores"]["pos"] == pytest.approx((positive @ query).tolist(), abs=2e-6)
        assert negatives.max() <= 0.95 * (positive @ query).min() + 2e-6
        kept[line["query"]] = line["neg"]
    assert summary.dropped["margin"] > 36 and len(kept) == 36 - summary.empty_queries
    unguided = lines_of(config_of(data, tmp_path / "all.jsonl", device="cpu", **options))
    assert any(line["neg"] != kept.get(line["query"]) for line in unguided)
