import sys
from pathlib import Path

import numpy as np
import pytest
from beir_samples import write_toy
from tiny_models import tiny_bert

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality_representations
from quality_tables import read_rows

from rag_retrieval.models.embedder import EmbeddingModel


def test_token_scores_are_the_sum_or_mean_over_the_query_of_the_largest_product():
    queries = [np.array([[1, 0], [0, 1]], np.float32)]
    documents = [np.array([[0.6, 0.8]], np.float32), np.array([[1, 0], [0, 0.5], [0.5, 0.25]], np.float32)]
    np.testing.assert_allclose(quality_representations.token_scores(queries, documents, False), [[1.4, 1.5]])
    np.testing.assert_allclose(quality_representations.token_scores(queries, documents, True), [[0.7, 0.75]])


def result(trained, figures, seed=0):
    return {
        "setting": {"data": "toy"}, "trainer": trained, "seed": seed,
        "figures": {way: {"ndcg@10": figure} for way, figure in figures.items()},
        "per_query": {way: {"q1": figure, "q2": figure / 2} for way, figure in figures.items()},
        "sizes": {way: 384 for way in figures if way != "ensemble"}, "versions": {"torch": "2"},
        "training": {"seconds": 3, "cpu_seconds": 2}, "command": f"python {trained}",
    }  # fmt: skip


def test_every_representation_is_compared_with_the_dense_vectors_trained_alone():
    rows = [result("base", {"dense": 0.1, "lexical": 0.1, "ensemble": 0.2}), result("dense", {"dense": 0.4})]
    rows += [result("unified", {"dense": 0.5, "lexical": 0.2, "ensemble": 0.8}, seed) for seed in (0, 1)]
    text = quality_representations.markdown_tables(rows)
    assert "| unified | 2 | 0.5000 (0.5000 to 0.5000) | 0.2000 (0.2000 to 0.2000) |  | 0.8000" in text
    lines = [line for line in text.splitlines() if " - dense: dense" in line]
    assert [line.split(" - ")[0] for line in lines] == ["unified: dense", "unified: lexical", "unified: ensemble"]
    assert "+0.0750" in lines[0] and "-0.1500" in lines[1] and "+0.3000" in lines[2]  # (.8 - .4) x (1 + 1/2) / 2


@pytest.mark.slow
def test_rows_are_trained_and_measured_from_one_base(tmp_path):
    tiny_bert(tmp_path / "bert")
    toy, out = write_toy(tmp_path / "toy"), tmp_path / "rows.jsonl"
    files = ["--data", str(toy), "--model", str(tmp_path / "bert"), "--out", str(out)]
    steps = ["--queries", "8", "--batch_size", "4", "--epochs", "2", "--depth", "4", "--threads", "1"]
    quality_representations.main([*files, *steps, "--train", "base", "unified"])
    quality_representations.main([*files, *steps, "--train", "base", "multi_vector", "--keys", "colbert_dim=8"])
    base, unified, same, narrow = read_rows(out)
    assert same["trainer"] == base["trainer"] == "base" and narrow["trainer"] == "multi_vector colbert_dim=8"
    assert narrow["setting"] == base["setting"], "rows of other keys stand in one table"
    assert narrow["sizes"]["multi_vector"] < unified["sizes"]["multi_vector"]
    theirs = ["--train", quality_representations.THEIRS, "--keys", "colbert_dim=8", "query_expansion=false"]
    quality_representations.main([*files, *steps, *theirs, "--work", str(tmp_path / "work")])
    row, folder = read_rows(out)[-1], tmp_path / "work" / quality_representations.THEIRS
    assert row["sizes"] == narrow["sizes"] and row["setting"] == base["setting"]
    assert list(row["figures"]) == ["multi_vector"]
    models = [EmbeddingModel.from_pretrained(folder / name) for name in ("start", "model")]
    before, after = (next(model.token_heads.parameters()) for model in models)
    assert (before - after).abs().max() > 1e-5
