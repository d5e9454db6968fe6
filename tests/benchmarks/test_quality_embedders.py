import json
import sys
from pathlib import Path

import pytest
from beir_samples import write_toy
from tiny_models import tiny_bert

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality_embedders
from quality_tables import read_rows

from rag_retrieval.data.beir import read_folder


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


def run(toy, out, *options: str) -> dict:
    files = ["--data", str(toy), "--model", str(toy.parent / "bert"), "--out", str(out)]
    steps = ["--queries", "8", "--batch_size", "4", "--epochs", "6", "--lr", "0.01"]
    quality_embedders.main([*files, *steps, "--depth", "4", "--threads", "1", *options])
    return read_rows(out)[-1]


def test_some_documents_are_the_relevant_ones_the_best_of_bm25_and_others(toy):
    folder = read_folder(toy)
    collection = quality_embedders.test_collection(folder, "2", 30)
    assert len(collection.documents) == 30 and list(collection.documents) == sorted(collection.documents)
    for query, grades in collection.qrels.items():
        topic = query.removeprefix("q")
        assert grades.keys() <= collection.documents.keys()
        assert {f"d{topic}-{number}" for number in (1, 2, 0, 3, 4)} <= collection.documents.keys(), "BM25's list"
    assert collection == quality_embedders.test_collection(folder, "2", 30), "the same for every row"
    assert len(quality_embedders.test_collection(folder, "all", None).documents) == 72


def test_rows_of_one_setting_stand_in_a_table_with_their_differences():
    def row(trainer, figure, **setting):
        per_query = {"q1": figure, "q2": figure / 2}
        return {
            "setting": {"data": "toy", **setting}, "trainer": trainer, "seed": 0, "per_query": per_query,
            "figures": dict.fromkeys(quality_embedders.COLUMNS, figure), "versions": {"torch": "2"},
            "training": {"seconds": 3, "cpu_seconds": 2}, "searching": {"seconds": 1, "cpu_seconds": 1},
            "command": f"python {trainer}",
        }  # fmt: skip

    text = quality_embedders.markdown_tables([row("base", 0.5), row("ours", 0.75), row("ours", 0.9, lr=1)])
    first, second = text.split("\n\ndata toy, lr 1")
    assert "| ours | 0 | 0.7500 | 0.7500 | 0.7500 | 0.7500 | 3 (2) | 1 (1) |" in first
    assert "ours (seed 0) - base (seed 0): ndcg@10 +0.1875" in first and "python base" in first
    assert "0.9000" in second and " - " not in second


@pytest.mark.slow
def test_both_trainers_start_from_the_base_and_are_measured_alike(toy, tmp_path):
    pytest.importorskip("sentence_transformers")
    tiny_bert(tmp_path / "bert")
    out = tmp_path / "rows.jsonl"
    rows = [run(toy, out, "--trainer", trainer) for trainer in quality_embedders.TRAINERS]
    assert len({json.dumps(row["setting"]) for row in rows}) == 1
    base, *trained = (row["figures"] for row in rows)
    for figures in trained:
        assert figures != base and all(0 <= value <= 1 for value in figures.values())
    assert quality_embedders.markdown_tables(read_rows(out)).count("gained/lost/same") == 3
