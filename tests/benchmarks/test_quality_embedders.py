import json
import sys
from pathlib import Path

import numpy as np
import pytest
from beir_samples import write_toy
from tiny_models import tiny_bert

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality_embedders
from quality_tables import read_rows

from rag_retrieval.data.beir import read_folder
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.vectors import finish


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


def result(trainer, figure, seed=0, **setting):
    return {
        "setting": {"data": "toy", **setting}, "trainer": trainer, "seed": seed,
        "per_query": {"q1": figure, "q2": figure / 2}, "readings": {"whole": figure, "int8": figure / 4},
        "figures": dict.fromkeys(quality_embedders.COLUMNS, figure), "versions": {"torch": "2"},
        "training": {"seconds": 3, "cpu_seconds": 2}, "searching": {"seconds": 1, "cpu_seconds": 1},
        "command": f"python {trainer} {seed}",
    }  # fmt: skip


def test_rows_of_one_setting_stand_in_a_table_with_their_differences():
    text = quality_embedders.markdown_tables([result("base", 0.5), result("ours", 0.75), result("ours", 0.9, lr=1)])
    first, second = text.split("\n\ndata toy, lr 1")
    assert "| ours | 1 | 0.7500 | 0.7500 | 0.7500 | 0.7500 | 3 (2) | 1 (1) | 0.1875 |" in first
    assert "ours - base: ndcg@10 +0.1875" in first and "python base" in first
    assert "0.9000" in second and " - " not in second


def test_seeds_are_averaged_and_the_base_stands_beside_all_of_them():
    ours = [result("ours", 0.8, seed) for seed in (0, 1)] + [result("ours", 0.6, 2)]
    text = quality_embedders.markdown_tables([result("base", 0.4), *ours, result("st", 0.6, 1), result("st", 0.2, 2)])
    assert "| ours | 3 | 0.7333 (0.6000 to 0.8000) |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("ours - base")]
    assert "+0.2500" in line and "(3 seeds)" in line  # (.7333 - .4) x (1 + 1/2) / 2
    (line,) = [line for line in text.splitlines() if line.startswith("st - ours")]
    assert "-0.2250" in line and "(2 seeds)" in line  # seeds 1 and 2: (.4 - .7) x .75


def test_models_and_runtimes_are_rows_of_one_table():
    options = quality_embedders.argument_parser().parse_args
    assert quality_embedders.trainer_name(options(["--trainer", "base"])) == "base"
    assert quality_embedders.trainer_name(options(["--trainer", "base", "--model", "a/b"])) == "base model=a/b"
    int8 = options(["--trainer", "base", "--model", "a/b", "--runtime", "onnx-int8"])
    assert quality_embedders.trainer_name(int8) == "base model=a/b runtime=onnx-int8"
    assert quality_embedders.trainer_name(options(["--model", "a/b", "--keys", "lr=1"])) == "ours model=a/b lr=1"
    text = quality_embedders.markdown_tables([result("base model=a/b", 0.4), *(result("ours", 0.8, s) for s in (1, 2))])
    (line,) = [line for line in text.splitlines() if line.startswith("ours - base model=a/b")]
    assert "+0.3000" in line and "(2 seeds)" in line  # (.8 - .4) x (1 + 1/2) / 2


def test_without_negatives_the_questions_and_answers_are_those_of_one(toy, tmp_path):
    drawn = (8, 1, 4, 0)
    of = [quality_embedders.draw_records(read_folder(toy), drawn, count, tmp_path / f"{count}") for count in (0, 1)]
    none, one = ([json.loads(line) for line in path.read_text().splitlines()] for path in of)
    assert len(none) == 8 and none == [record | {"neg": []} for record in one] and all(record["neg"] for record in one)


def test_vectors_are_read_whole_cut_and_in_fewer_bits():
    queries = finish(np.array([[3, 1, 1, 1, 0, 0, 0, 4]]))
    documents = finish(np.array([[1, 0, 0, 0, 0, 0, 0, 9], [2, 1, 1, 1, 1, 1, 1, 1]]))
    readings = quality_embedders.readings_of(queries, documents)
    assert list(readings) == ["whole", "4 wide", "2 wide", "1 wide", "int8", "binary"]
    best = {name: int((left @ right.T).argmax()) for name, (left, right) in readings.items()}
    assert best == {"whole": 0, "4 wide": 1, "2 wide": 1, "1 wide": 0, "int8": 0, "binary": 1}
    assert set(readings["binary"][1].ravel()) == {-1, 1}
    assert abs(readings["int8"][1] - documents).max() < 0.01


@pytest.mark.slow
def test_both_trainers_start_from_the_base_and_are_measured_alike(toy, tmp_path):
    pytest.importorskip("sentence_transformers")
    tiny_bert(tmp_path / "bert")
    out = tmp_path / "rows.jsonl"
    rows = [run(toy, out, "--trainer", trainer) for trainer in quality_embedders.TRAINERS]
    of = f"model={tmp_path / 'bert'}"
    assert [row["trainer"] for row in rows] == [
        f"base {of}", f"ours {of} batch_size=4", f"sentence-transformers {of} batch_size=4",
    ]  # fmt: skip
    assert len({json.dumps(row["setting"]) for row in rows}) == 1
    base, *trained = (row["figures"] for row in rows)
    for figures in trained:
        assert figures != base and all(0 <= value <= 1 for value in figures.values())
    assert quality_embedders.markdown_tables(read_rows(out)).count("gained/lost/same") == 3


@pytest.mark.slow
def test_sentence_transformers_trains_with_the_prompts_of_the_base(toy, tmp_path):
    pytest.importorskip("sentence_transformers")
    tiny_bert(tmp_path / "bert")
    weights = []
    for prompts in ({}, {"query": "word1 word2 "}, {"document": "word1 word2 "}):
        base, work = tmp_path / f"base{len(weights)}", tmp_path / f"work{len(weights)}"
        EmbeddingModel.from_pretrained(tmp_path / "bert", prompts=prompts).save_pretrained(base)
        theirs = ("--trainer", "sentence-transformers", "--model", str(base), "--work", str(work))
        run(toy, tmp_path / "rows.jsonl", *theirs)
        weights.append((work / "model" / "model.safetensors").read_bytes())
    assert len(set(weights)) == 3


@pytest.mark.slow
def test_an_exported_model_finds_what_the_model_finds(toy, tmp_path):
    pytest.importorskip("onnxruntime")
    tiny_bert(tmp_path / "bert")
    EmbeddingModel.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "embedder")
    base = (toy, tmp_path / "rows.jsonl", "--trainer", "base", "--model", str(tmp_path / "embedder"))
    model, exported = run(*base), run(*base, "--runtime", "onnx")
    assert exported["trainer"] == f"{model['trainer']} runtime=onnx"
    assert exported["figures"] == pytest.approx(model["figures"])
    run(*base, "--runtime", "onnx-static-int8", "--work", str(tmp_path / "static"))
    description = json.loads((tmp_path / "static" / "exported" / "embedder_onnx.json").read_text())
    assert description["verification"]["calibrated_with"] == "toy"
